"""Own the names, cities and goods that orders are about.

It must not know how an order is phrased or how a record is written.
"""

from __future__ import annotations

NAMES = (
    "Aaron Abby Aisha Alan Alba Alma Amelia Andrea Anton Aria Arno Bianca Boris Bridget Camille Carl Cecilia Cesar "
    "Claire Colin Cora Dalia Damian Dario Denis Dennis Edward Elise Elliot Elsa Emily Enzo Ethan Fatima Fabian "
    "Flora Gina Gloria Gustav Harriet Hector Heidi Ian Imran Ingrid Irene Jakob Jamal Janet Jean Joel Joseph "
    "Karen Katrin Kim Klaus Lars Leila Lena Leon Lisa Lorenzo Luca Magda Manuel Marcel Margaret Maria Mario Mark "
    "Maya Michael Miguel Mohammed Monica Natalia Nick Nikos Noor Olivia Pablo Patrick Pavel Philip Priya Rachel "
    "Ravi Rebecca Richard Roland Samira Sean Sebastian Silvia Stefan Sven Tamara Teresa Tobias Tony Ursula "
    "Valentina Vikram William Yasmin Yuki Anna Peter Laura Tom Sofia Paul Nina Omar Eva David"
).split()

CITIES = (
    "Aachen, Antwerp, Austin, Bari, Basel, Belfast, Bilbao, Bordeaux, Bremen, Bruges, Brussels, Calais, Cardiff, "
    "Catania, Cologne, Como, Dover, Dresden, Essen, Exeter, Ferrara, Frankfurt, Galway, Girona, Granada, Grenoble, "
    "Hanover, Innsbruck, Kiel, Kyoto, Lausanne, Lille, Linz, Liverpool, Lucerne, Lund, Malaga, Mainz, Marseille, "
    "Montreal, Nancy, Nantes, Odessa, Orleans, Oxford, Palermo, Parma, Pisa, Plymouth, Poznan, Rennes, Rotterdam, "
    "Salzburg, San Jose, Siena, Strasbourg, Toledo, Toulouse, Trieste, Utrecht, Valencia, Venice, Verona, "
    "Wellington, Lyon, London, Paris, Berlin, Madrid, Oslo, Dublin, Vienna, Rome, New York"
).split(", ")

# Units that a shop uses -> what it sells in them. The empty key is what is sold by the piece.
GOODS: dict[str, str] = {
    "box bag pack tin": "green tea, black tea, mint tea, ginger tea, white tea, herbal tea, cocoa powder, oat "
    "biscuits, butter cookies, rye crackers",
    "bag sack kilo": "brown rice, white rice, red lentils, chickpeas, black beans, wheat flour, rye flour, potatoes, "
    "carrots, onions, oats, sea salt, cane sugar, coffee beans, ground coffee, sunflower seeds, bird seed, potting "
    "soil, charcoal",
    "bottle litre case": "olive oil, apple juice, orange juice, red wine, white wine, sparkling water, lemon syrup, "
    "cider, white vinegar, soy sauce, fish sauce, dish soap, maple syrup",
    "jar pot": "honey, strawberry jam, apricot jam, peanut butter, mustard, tomato sauce, green olives, pickles, "
    "mango chutney, garlic paste",
    "crate box kilo": "oranges, lemons, red apples, green apples, pears, plums, peaches, cherries, tomatoes, "
    "cucumbers, peppers, mushrooms, figs, grapes",
    "pack box": "paper napkins, tea lights, drawing pins, envelopes, printer paper, batteries, paper cups, "
    "matches, light bulbs, coffee filters",
    "roll": "kitchen paper, packing tape, blue ribbon, wrapping paper, copper wire, garden twine, baking paper",
    "bunch": "tulips, roses, parsley, basil, spinach, radishes, bananas, white lilies",
    "can tin": "white paint, blue paint, wood varnish, tomato soup, sweet corn, tuna, coconut milk, sardines",
    "tray": "eggs, sandwiches, cupcakes, seedlings, lemon cakes, apple tarts",
    "": "umbrella, desk lamp, wool blanket, garden chair, tea pot, coffee mug, bread knife, soup bowl, door mat, "
    "wall clock, picture frame, wooden spoon, bath towel, cotton shirt, rain coat, flower pot, travel bag, water "
    "bottle, oak stool, paint brush, chess set, notebook, fountain pen, candle, mirror, straw hat, bread basket",
}
