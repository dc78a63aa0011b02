"""May rows share a stream? What a model must hold to, and a probe at loading of what it does.

Log-probabilities of packed rows must equal those of the model's own forward pass, and no row may change how the rows
beside it are turned by their places.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..tensors import Layout
from .attention import NAME, PackedAttention
from .blocks import Blocks, blocks_of

# How far two ways to the same numbers may lie apart: each in float32, and in bfloat16 all, as a share of their length.
EXACT, ROUNDED = 1e-3, 0.15


def apart(hf: PreTrainedModel, difference: float) -> str:
    """Why rows may not share a stream, given what `probe` found; nothing where they may."""
    if difference >= (ROUNDED if hf.device.type == "cuda" else EXACT):
        return f"answers differently when packed ({difference:.1e})"
    return ""


def context_of(config: PreTrainedConfig) -> int:
    """The longest row: all positions of the model, or of those with `longrope` the ones of its shorter length.

    Beyond that length transformers turns all rows of a call otherwise, in training and in every step of an answer.
    """
    text = config.get_text_config()  # its part about text, where a model also sees or hears
    found = text.to_dict().get("rope_parameters") or {}
    kinds = [part for part in found.values() if isinstance(part, dict)] or [found]  # of kinds of layers, or of all
    shorter = [part["original_max_position_embeddings"] for part in kinds if part.get("rope_type") == "longrope"]
    return min([int(getattr(text, "max_position_embeddings", 2048)), *map(int, shorter)])


def hold_still(hf: PreTrainedModel) -> list[str]:
    """Keep turns that grow with a row as they are within the context, which is where rows are; a note says so.

    transformers changes them with the longest row, so that one row would change what stands beside it or comes after.
    """
    held, longest = "", context_of(hf.config)
    two_lengths = longest < hf.config.get_text_config().max_position_embeddings
    for module in hf.modules():
        kind = vars(module).get("rope_type")
        if isinstance(kind, str) and ("dynamic" in kind or (kind == "longrope" and two_lengths)):
            vars(module)["rope_type"], held = "default", kind  # read nowhere else once the module is made
    return [f"rows have up to {longest:,} tokens, beyond which all would be turned otherwise ({held})"] if held else []


@torch.no_grad()
def probe(hf: PreTrainedModel, device: torch.device) -> float:
    """Difference in log-probability between three packed rows and the model's own forward pass.

    The largest; on a GPU, where single ones are rounded far, all of them over what distinguishes the tokens. The second
    row continues the first (a shared prompt); the third stands alone.
    """
    head = hf.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    size = int(head.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randint(0, size, (n,), generator=generator).to(device) for n in (7, 5, 9))
    layout = Layout(lengths=(7, 5, 9), parents=(-1, 0, -1))
    positions = torch.cat([torch.arange(7), torch.arange(7, 12), torch.arange(9)]).to(device)
    try:
        hidden = hf.base_model(
            input_ids=torch.cat([first, second, third])[None],
            position_ids=positions[None],
            use_cache=False,
            attend=PackedAttention(layout),
        ).last_hidden_state[0]
        packed = torch.log_softmax(hidden.float() @ head.weight.float().T, -1)
        hf.set_attn_implementation("eager")
        whole = [torch.cat([first, second]), third]
        plain = torch.cat([hf(row[None], use_cache=False).logits[0] for row in whole])
        plain = torch.log_softmax(plain.float(), -1)
        apart, spread = packed - plain, plain - plain.mean(-1, keepdim=True)
        difference = apart.norm() / spread.norm() if device.type == "cuda" else apart.abs().max()
    except (ModelError, TypeError, RuntimeError, AttributeError):
        return float("inf")
    finally:
        hf.set_attn_implementation(NAME)
    return float(difference)


@torch.no_grad()
def probed_blocks(hf: PreTrainedModel) -> Blocks | None:
    """The blocks of `hf`, if it is made of them and they give the hidden states of its own forward."""
    found = blocks_of(hf)
    if found is None:
        return None
    size, device = int(hf.get_input_embeddings().weight.shape[0]), hf.device  # type: ignore[arg-type]
    tokens = torch.randint(0, size, (9,), generator=torch.Generator().manual_seed(1)).to(device)
    positions, attend = torch.arange(9, device=device), PackedAttention(Layout.alone(9))
    own = hf.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, attend=attend)
    answer, own_answer = found.answer(tokens, positions, attend), own.last_hidden_state[0]
    if device.type == "cuda":
        near = float((answer - own_answer).norm() / own_answer.norm()) < ROUNDED
    else:
        near = torch.allclose(answer, own_answer, rtol=EXACT, atol=EXACT)
    return found if near else None
