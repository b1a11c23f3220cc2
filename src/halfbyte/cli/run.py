"""`halfbyte run`: measure, train, measure again, and leave the evidence.

It owns the verb's options; the work is the pipeline's, and it must not know how that is done.
"""

from __future__ import annotations

from halfbyte.cli import recipe as r

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte run recipe.yaml\n\n"
    "halfbyte run recipe.yaml --set train.learning_rate=1e-4 --output-dir runs/slower\n\n"
    "halfbyte run recipe.yaml --resume\n\n"
    "halfbyte run --model models/base --data rows.jsonl --output-dir runs/first --dry-run"
)


def run(
    recipe: r.RecipeFile = None,
    *,
    settings: r.Set = None,
    model: r.Model = None,
    data: r.Data = None,
    method: r.Method = None,
    output_dir: r.OutputDir = None,
    skip_bad_rows: r.SkipBadRows = None,
    overwrite: r.Overwrite = False,
    resume: r.Resume = False,
    dry_run: r.DryRun = False,
    as_json: r.Json = False,
) -> None:
    """Measure the base model, train it, measure it again, and leave the evidence in one folder."""
    r.carry_out(
        recipe,
        settings,
        r.Flags(model, data, method, output_dir, skip_bad_rows),
        r.Wishes(evaluate=True, overwrite=overwrite, resume=resume, dry_run=dry_run, as_json=as_json),
    )
