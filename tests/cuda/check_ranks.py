"""Check DDP, FSDP2 and sequence parallelism of an attached model over all GPUs of a host.

    PYTHONPATH=src:tests python -m torch.distributed.run --standalone --nproc-per-node 2 \
        tests/cuda/check_ranks.py OUT.json

A Qwen3-VL of four layers, trained by SGD. Rank 0 prints one line for each check, writes them as JSON, and
exits with 1 if one failed:

- losses of every rank and step against one process that trains on the same global batch;
- in one of the steps the last rank has text alone, where fixed shapes make that possible;
- forward and backward under CUDA's own sync debug mode "error", which collectives do not trigger;
- logits of a flattened row cut into contiguous parts, with an all-to-all around attention (Ulysses).

Without CUDA it runs over gloo, with the package's guard in place of CUDA's debug mode.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mrope import MRopeCollator, MRopeSpec, Shapes, VisionSpec
from mrope.hf import attach
from mrope.training.step import to_device
from mrope.transforms import shard_sequence
from support.no_syncs import no_syncs

STEPS, LEARNING_RATE = 4, 0.05
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_heads": 4,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 512,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [1, 2, 3],
}
CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": 8000,
    "video_token_id": 8001,
    "vision_start_token_id": 8002,
    "vision_end_token_id": 8003,
    "text_config": {"model_type": "qwen3_vl_text", **TEXT},
    "vision_config": {"model_type": "qwen3_vl", **VISION},
}
SHAPES = Shapes(tokens=(1024,), patches=(2048,), longest=400)
# Ways to wrap a model, and what its batches are: (compiled, fixed shapes).
VARIANTS = {
    "attached": (False, False),
    "attached, shapes": (False, True),
    "compiled, shapes": (True, True),
}
Batch = dict[str, Any]


def random_examples(seed: int, text_alone: bool) -> list[Batch]:
    """Return two to four examples, with images of many sizes or text alone."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(int(rng.integers(2, 5))):
        sides = [] if text_alone else [(rng.integers(3, 9, 2) * 2).tolist()]
        ids = rng.integers(1, 7000, int(rng.integers(20, 60))).tolist()
        for height, width in sides:
            ids += [8002, *[8000] * (height * width // 4), 8003]
        ids += rng.integers(1, 7000, int(rng.integers(20, 60))).tolist()
        example = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
        if sides:
            patches = sum(height * width for height, width in sides)
            pixels = rng.standard_normal((patches, 1536), dtype=np.float32)
            example["pixel_values"] = torch.from_numpy(pixels)
            example["image_grid_thw"] = torch.tensor([[1, *side] for side in sides])
        examples.append(example)
    return examples


def make_model(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the same model on every rank; the caller attaches it."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    config = transformers.AutoConfig.for_model(**copy.deepcopy(CONFIG))
    return auto.from_config(config, attn_implementation="sdpa", dtype=dtype).to(device).train()


def wrap(model: Any, how: str, compiled: bool) -> Any:
    """Return a module of which each rank runs its own batch."""
    layers = [*model.model.visual.blocks, *model.model.language_model.layers]
    if how == "DDP":
        # The graph stays whole: DDP's optimizer would cut it into buckets.
        torch._dynamo.config.optimize_ddp = False
        run: Any = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        return DistributedDataParallel(run)
    for layer in layers:
        if compiled:  # FSDP2's hooks stand between layers, so that each is a graph of its own
            layer.compile(fullgraph=True, dynamic=False)
        fully_shard(layer)
    fully_shard(model.model.visual)
    fully_shard(model)
    return model


def collators() -> dict[bool, MRopeCollator]:
    spec, vision = MRopeSpec.from_config(CONFIG), VisionSpec.from_config(CONFIG)
    make = MRopeCollator
    return {
        fixed: make(None, spec, vision, packing="flatten", shapes=SHAPES if fixed else None)
        for fixed in (False, True)
    }


def batches_of_step(step: int, ranks: int, collate: MRopeCollator, device: torch.device) -> Any:
    """Return the batch of each rank; in the last step the last rank has text alone, if it can."""
    alone = collate.shapes is not None and step == STEPS - 1
    return [
        to_device(collate(random_examples(97 * step + one, alone and one == ranks - 1)), device)
        for one in range(ranks)
    ]


def single_process_losses(collate: MRopeCollator, ranks: int, device: torch.device) -> list[Any]:
    """Train one attached model on the batches of all ranks; return losses by step and rank."""
    model = attach(make_model(device, torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    table = []
    for step in range(STEPS):
        losses = []
        for batch in batches_of_step(step, ranks, collate, device):
            loss = model(**batch).loss
            (loss / ranks).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        table.append(losses)
    return table


def check_training(how: str, name: str, device: torch.device) -> Batch:
    """Train a wrapped model; compare losses, then watch two steps in bfloat16 for syncs."""
    compiled, fixed = VARIANTS[name]
    collate, ranks, rank = collators()[fixed], dist.get_world_size(), dist.get_rank()
    wanted = single_process_losses(collate, ranks, device)
    model = wrap(attach(make_model(device, torch.float32)), how, compiled)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    worst = 0.0
    for step in range(STEPS):
        loss = model(**batches_of_step(step, ranks, collate, device)[rank]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        worst = max(worst, abs(loss.item() - wanted[step][rank]))
    torch._dynamo.reset()
    half = wrap(attach(make_model(device, torch.bfloat16)), how, compiled)
    step_batches = [batches_of_step(step, ranks, collate, device)[rank] for step in range(3)]
    for batch in step_batches[:2]:
        half(**batch).loss.backward()
    # CUDA's debug mode sees what the guard does not: compiled graphs. Gloo's collectives copy.
    unseen = device.type == "cpu" and (compiled or how == "FSDP2")
    with nullcontext() if unseen else no_syncs(device):
        half(**step_batches[2]).loss.backward()
    torch._dynamo.reset()
    return {"largest loss difference": everywhere(worst, device), "limit": 1e-4}


def everywhere(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks."""
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


class AllToAll(torch.autograd.Function):
    """Trade a split along one dimension for a split along another: Ulysses' exchange."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, cut: int, joined: int) -> torch.Tensor:
        ctx.dimensions = (joined, cut)
        given = [one.contiguous() for one in whole.chunk(dist.get_world_size(), dim=cut)]
        if dist.get_backend() == "nccl":
            taken = [torch.empty_like(one) for one in given]
            dist.all_to_all(taken, given)
        else:  # gloo has no all-to-all
            every = [torch.empty_like(whole) for _ in given]
            dist.all_gather(every, whole.contiguous())
            taken = [one.chunk(len(given), dim=cut)[dist.get_rank()] for one in every]
        return torch.cat(taken, dim=joined)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return exchange(grad, *ctx.dimensions), None, None


def exchange(whole: torch.Tensor, cut: int, joined: int) -> torch.Tensor:
    apply: Any = AllToAll.apply
    exchanged: torch.Tensor = apply(whole, cut, joined)
    return exchanged


def ulysses_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attend over the whole row with a share of the heads, given a part of it with all heads.

    Args:
        query, key, value: (1, heads, L, dimension).
    """
    from mrope.hf.attention import attend_text

    query, key, value = (exchange(one, 1, 2) for one in (query, key, value))
    output, _ = attend_text(module, query, key, value, attention_mask, **kwargs)
    return exchange(output, 1, 2), None


def check_ulysses(device: torch.device) -> Batch:
    """Compare logits and the gradient of the embeddings on contiguous parts with the whole row."""
    transformers.AttentionInterface.register("ulysses", ulysses_attention)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ranks, rank = dist.get_world_size(), dist.get_rank()
    batch = collators()[False](random_examples(5, False))
    model = attach(make_model(device, dtype))
    whole = to_device(batch, device)
    embeds = embed(model.model, whole)
    wanted, total, gradient = run_text_model(model, {**whole, "embeds": embeds})
    part = to_device(shard_sequence({**batch, "embeds": embeds.cpu()}, rank, ranks), device)
    for layer in model.model.language_model.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = "ulysses"
    logits, loss, own_gradient = run_text_model(model, part)
    dist.all_reduce(loss)
    mine = slice(rank * logits.shape[1], min((rank + 1) * logits.shape[1], wanted.shape[1]))
    width = mine.stop - mine.start
    apart = (own_gradient[:, :width] - gradient[:, mine]).float().norm()
    return {
        "largest logit": wanted.abs().max().item(),
        "largest logit difference": everywhere(
            (logits[:, :width] - wanted[:, mine]).abs().max().item(), device
        ),
        "relative loss difference": abs(loss.item() / total.item() - 1),
        "relative gradient difference": everywhere(
            (apart / gradient[:, mine].float().norm()).item(), device
        ),
        "limit": 0.05 if dtype == torch.bfloat16 else 1e-4,
    }


def run_text_model(model: Any, part: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, summed loss, and the gradient of the embeddings, of a row or a part of it."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    borders = {name: part[name] for name in names}
    if not part["cu_seq_lens_q"].is_cuda:
        borders["attention_mask"] = block_mask(part["cu_seq_lens_q"])
    embeds = part["embeds"].detach().to(next(model.parameters()).dtype).requires_grad_()
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=part["position_ids"][-3:], use_cache=False, **borders
    ).last_hidden_state
    logits = model.lm_head(hidden)
    targets = part["shift_labels"] if "shift_labels" in part else shifted(part["labels"])
    loss: Any = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
    )
    loss.backward()
    return logits.detach(), loss.detach(), embeds.grad


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each token of a row predicts."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def block_mask(borders: torch.Tensor) -> torch.Tensor:
    """Return the mask of a whole flattened row, (1, 1, T, T); for CPUs, which have no kernel."""
    place = torch.arange(int(borders[-1]))
    segment = torch.bucketize(place, borders[1:-1].long(), right=True)
    return ((segment[:, None] == segment) & (place[:, None] >= place))[None, None]


def embed(base: Any, batch: Batch) -> torch.Tensor:
    """Return the embeddings of the whole row with the features in their places, without deepstack."""
    with torch.no_grad():
        embeds = base.get_input_embeddings()(batch["input_ids"]).flatten(0, 1)
        features = base.visual(batch["pixel_values"].to(embeds), grid_thw=batch["image_grid_thw"])
        embeds = embeds.index_copy(0, batch["image_scatter_index"], features.pooler_output)
    whole: torch.Tensor = embeds.view(*batch["input_ids"].shape, -1)
    return whole


def main(file: str) -> int:
    on_gpu = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    report: Batch = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "checks": {},
    }
    checks: list[tuple[str, Any]] = [
        (f"{how}, {name}", lambda how=how, name=name: check_training(how, name, device))
        for how in ("DDP", "FSDP2")
        for name in VARIANTS
    ]
    failed = False
    for name, check in [*checks, ("Ulysses over contiguous parts", lambda: check_ulysses(device))]:
        try:
            found = check()
        except Exception as error:  # the other rank most likely failed in the same way
            raise RuntimeError(f"{name}: {error}") from error
        differences = [value for key, value in found.items() if key.endswith("difference")]
        found["passed"] = max(differences) <= found["limit"]
        failed |= not found["passed"]
        report["checks"][name] = found
        if rank == 0:
            print(name, found, flush=True)
    if rank == 0:
        Path(file).write_text(json.dumps(report, indent=1), encoding="utf-8")
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
