"""Which parts learn, how fast, with which decay: one declarative spec (`parts` of the configuration)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fmray.config.schema import PartConfig, PartName
from fmray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that learn alike."""

    name: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


def parameter_groups(
    model: nn.Module, parts: dict[PartName, PartConfig], lr: float, weight_decay: float
) -> list[ParameterGroup]:
    """Apply the freezing spec, and group what is left by learning rate and decay.

    Biases, norms and scalars (fewer than two dimensions) never decay. Raises ConfigError where nothing learns.
    """
    locked = {part: _locked_parameters(model, part, config) for part, config in parts.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in locked.get(_part_of(name), ()))

    def learns(name: str) -> tuple[str, float, float]:
        config = parts.get(_part_of(name), PartConfig())
        decay = weight_decay if config.weight_decay is None else config.weight_decay
        return _part_of(name), lr if config.lr is None else config.lr, decay

    groups = grouped(model, learns)
    if not groups:
        raise ConfigError("parts", "none", "every part is locked: let at least one learn")
    return groups


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


def _locked_parameters(model: nn.Module, part: PartName, config: PartConfig) -> set[str]:
    """Names of a part's parameters that do not learn."""
    module = model.get_submodule(part)
    names = [f"{part}.{name}" for name, _ in module.named_parameters()]
    if config.train == "all":
        return set()
    if config.train == "none":
        return set(names)
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
