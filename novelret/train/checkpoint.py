"""What a run that was killed goes on from, and the weights of the checkpoints worth keeping.

resume/weights-STEP.safetensors   trained weights: of the last validation, the best and those to keep
resume/moments-STEP.safetensors   the optimizer's, of the last validation
resume/state.json                 validation points and the loss scale; its rename makes the rest count
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from novelret.artifacts import read_json, write_json
from novelret.train.tower import Tower
from novelret.train.validation import Point


def save(
    tower: Tower,
    optimizer: torch.optim.Optimizer,
    scale: dict[str, Any],
    folder: Path,
    points: list[Point],
    step: int,
    wanted: set[int],
) -> None:
    """Write the state after `step` steps; weights of other steps stay only if `wanted`."""
    resume = folder / "resume"
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(tower).items()}
    moments = {
        f"{number}/{name}": value.cpu().contiguous()
        for number, of_parameter in optimizer.state_dict()["state"].items()
        for name, value in of_parameter.items()
    }
    for kind, tensors in (("weights", weights), ("moments", moments)):
        temporary = resume / f"{kind}.tmp"
        save_file(tensors, temporary)
        temporary.replace(resume / f"{kind}-{step}.safetensors")  # a resumed run may save a step again
    state = {"step": step, "points": [asdict(point) for point in points], "scale": scale}
    write_json(resume / "state.json", state)
    for old in resume.glob("*-*.safetensors"):
        kind, _, at = old.stem.partition("-")
        if int(at) != step and (kind == "moments" or int(at) not in wanted):
            old.unlink()


def load(
    tower: Tower, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, folder: Path
) -> tuple[list[Point], int]:
    """Take up the last saved state: its validation points and steps done; none where nothing was saved."""
    path = folder / "resume" / "state.json"
    if not path.is_file():
        return [], 0
    saved = read_json(path)
    points, step = [Point(**point) for point in saved["points"]], int(saved["step"])
    load_weights(tower, folder, step)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "resume" / f"moments-{step}.safetensors").items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if saved["scale"]:
        scaler.load_state_dict(saved["scale"])
    return points, step


def load_weights(tower: Tower, folder: Path, step: int, share: float = 1.0, memory: float = 1.0) -> None:
    """Put the weights of a saved step into the tower, or others near them.

    Args:
        tower: whose weights are set.
        folder: of the run.
        step: which checkpoint.
        share: of the line from step 0 to it.
        memory: a memory keeps this share of its scale.
    """
    weights = load_file(folder / "resume" / f"weights-{step}.safetensors")
    first = weights if share == 1 else load_file(folder / "resume" / "weights-0.safetensors")
    with torch.no_grad():
        for name, parameter in _trained(tower).items():
            parameter.copy_(torch.lerp(first[name], weights[name], share))
        if tower.memory is not None:
            tower.memory.scale.mul_(memory)


def _trained(tower: Tower) -> dict[str, Tensor]:
    return {name: p for name, p in tower.module.named_parameters() if p.requires_grad}
