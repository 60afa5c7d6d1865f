"""Which parts learn, how fast, with which decay: one declarative spec (`parts` of the configuration)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fmray.config.schema import PartConfig
from fmray.errors import ConfigError

Part = TypeVar("Part", bound=str)

CROSS_ATTENTION = frozenset({"crossattention", "ln_cross_attn"})
"""What transformers' decoders (GPT-2, BERT) call the part of a block that reads another sequence."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that learn alike."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


def parameter_groups(
    model: nn.Module, parts: Mapping[Part, PartConfig], lr: float, weight_decay: float
) -> list[ParameterGroup]:
    """Apply the freezing spec, and group what is left by learning rate and decay.

    A part is what the model's parameter names begin with. Biases, norms and scalars (fewer than two dimensions) never decay.
    Raises ConfigError where nothing learns, or of a part that the model does not have.
    """
    for part, config in parts.items():
        _check_part(model, part, config)
    locked = {part: _locked_parameters(model, part, config) for part, config in parts.items()}
    for name, parameter in model.named_parameters():
        # what is locked already stays so: beside an adapter the model's own weights are
        learns_still = parameter.requires_grad and name not in locked.get(_part_of(name), ())
        parameter.requires_grad_(learns_still)

    def learns(name: str) -> tuple[str, float, float]:
        config = parts.get(_part_of(name), PartConfig())
        decay = weight_decay if config.weight_decay is None else config.weight_decay
        return _part_of(name), lr if config.lr is None else config.lr, decay

    groups = grouped(model, learns)
    if not groups:
        raise ConfigError("parts", "none", "every part is locked: let at least one learn")
    return groups


def _check_part(model: nn.Module, part: str, config: PartConfig) -> None:
    children = dict(model.named_children())
    if part in children:
        return
    known = [name for name, child in children.items() if any(True for _ in child.parameters())]
    near = difflib.get_close_matches(part, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    cure = f"the model has no such part; there are: {', '.join(known)}{meant}"
    raise ConfigError(f"parts.{part}", config.train, cure)


def _part_of(name: str) -> Any:
    return name.split(".", 1)[0]


def grouped(model: nn.Module, learns: Callable[[str], tuple[str, float, float]]) -> list[ParameterGroup]:
    """What learns, by part and by whether it decays; `learns` gives a parameter's part, learning rate and weight decay.

    Biases, norms and scalars (fewer than two dimensions) never decay; they are a group of their own where the rest does.
    """
    groups: dict[tuple[str, bool], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, lr, decay = learns(name)
        apart = decay > 0 and parameter.dim() < 2
        label = f"{part}/no_decay" if apart else part
        group = groups.setdefault((part, apart), ParameterGroup(label, [], lr, 0.0 if apart else decay))
        group.parameters.append(parameter)
    return list(groups.values())


def _locked_parameters(model: nn.Module, part: str, config: PartConfig) -> set[str]:
    """Names of a part's parameters that do not learn."""
    module = model.get_submodule(part)
    names = [f"{part}.{name}" for name, _ in module.named_parameters()]
    if config.train == "all":
        return set()
    if config.train == "none":
        return set(names)
    if config.train == "cross_attention":
        attending = {name for name in names if CROSS_ATTENTION & set(name.split("."))}
        if not attending:
            raise ConfigError(f"parts.{part}.train", config.train, "has no cross-attention; use all or none")
        return set(names) - attending
    count = int(config.train.removeprefix("last:"))
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"parts.{part}.train", config.train, "has no blocks; use all or none")
    path, blocks = max(lists, key=lambda item: len(item[1]))
    if count > len(blocks):
        raise ConfigError(f"parts.{part}.train", config.train, f"has only {len(blocks)} blocks")
    # registration order is forward order: what stands before the first learning block is locked
    first = next(
        i for i, name in enumerate(names) if name.startswith(f"{part}.{path}.{len(blocks) - count}.")
    )
    return set(names[:first])
