"""Own the start of the tiny base: random weights in which one pair of attention heads already copies.

It must not know the corpus, nor how the model is trained afterwards.

A transformer learns to repeat what stood in its context by composing a head that looks one token back with one that
looks for that token (an induction head). At this size and with this little text the pair forms late; writing a rough
one into the random start saves most of the training. Everything remains trainable.

Source of the circuit: Olsson et al., In-context Learning and Induction Heads (arXiv 2209.11895).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

EMBEDDING_STD = 0.02
SHARPNESS = 14.0  # logit of the position after an equal token, above those of others
CONTRAST = 5.0  # logit of the previous position, above those farther back
GAIN = 4.0  # how loudly what was found is said
MLP_SHARE = 0.3  # of the usual start of the MLPs, so that they do not drown it
ROTATING_PAIRS = 8  # the fastest rotary pairs, which tell neighbours apart
SLOW = 0.1  # rotary frequencies below this hardly turn within a document


@torch.no_grad()
def write_induction_heads(model: LlamaForCausalLM) -> None:
    """Write a previous-token head into layer 0 and induction heads into layer 1, in place.

    Args:
        model: A freshly initialised Llama with as many key as query heads and at least two layers.
    """
    config = model.config
    H, heads = config.hidden_size, config.num_attention_heads
    D = H // heads
    half = D // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)  # (D/2,)

    # A direction that all embeddings share lets a head ignore what the token is.
    shared = torch.full((H,), EMBEDDING_STD) * torch.where(torch.rand(H) < 0.5, -1.0, 1.0)
    model.model.embed_tokens.weight.add_(shared)
    shared = shared / shared.norm()

    def blind(weight: Tensor) -> Tensor:
        """The weight without its view of the shared direction."""
        return weight - (weight @ shared)[:, None] * shared

    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(MLP_SHARE)
    written = torch.linalg.qr(torch.randn(H, H))[0][:, :D]  # (H, D): where the previous token is noted
    noted = torch.linalg.qr(torch.randn(H, H))[0][:D]  # (D, H): what is noted of it

    back = model.model.layers[0].self_attn
    n = ROTATING_PAIRS
    turned = (CONTRAST / (1 - torch.cos(frequency[:n])).sum() * D**0.5) ** 0.5 / (H / 2) ** 0.5
    query, key = torch.zeros(D), torch.zeros(D)
    key[:n] = turned
    query[:n], query[half : half + n] = turned * torch.cos(frequency[:n]), -turned * torch.sin(frequency[:n])
    back.q_proj.weight[:D] = torch.outer(query, shared)
    back.k_proj.weight[:D] = torch.outer(key, shared)
    back.v_proj.weight[:D] = blind(noted)
    back.o_proj.weight[:, :D] = written * EMBEDDING_STD * 2**0.5

    induct = model.model.layers[1].self_attn
    slow = torch.cat([frequency < SLOW] * 2).float()
    match = (SHARPNESS * D**0.5 / (slow.sum() / 4)) ** 0.5
    values = torch.linalg.qr(torch.randn(H, H))[0]
    for head in range(heads):
        rows = slice(head * D, (head + 1) * D)
        induct.q_proj.weight[rows] = blind(noted) * slow[:, None] * match
        induct.k_proj.weight[rows] = blind(written.T) * slow[:, None] * match
        induct.v_proj.weight[rows] = blind(values[rows])
        induct.o_proj.weight[:, rows] = values[rows].T * GAIN * EMBEDDING_STD * 2
