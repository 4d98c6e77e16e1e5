"""The optimizers and schedules that the papers use for their patch methods, for job specs that leave them out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from multitask.spec.errors import quoted


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A paper's optimizer and schedule, in the form of a job spec."""

    source: str
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    per_data_set: Mapping[str, str] = field(default_factory=dict)
    """Key that the recipe leaves out because the paper sets it for each data set -> the paper's rule for it."""


K_FOR_1 = Recipe(
    source="Mudrakarta et al., 'K for the Price of 1', ICLR 2019, section 5.1",
    # The rate is from the paper. The other constants are those of TF-slim, which the paper trained with.
    optimizer={"name": "rmsprop", "rate": 0.045, "decay": 0.9, "momentum": 0.9, "eps": 1.0, "weight_decay": 4e-5},
    schedule={"name": "exponential", "factor": 0.98},
    per_data_set={"schedule.every_rounds": "2.5 epochs, so 2.5 * training images / (batch_size * accumulate)"},
)
K_FOR_1_WHOLE_NETWORK = replace(
    K_FOR_1,
    optimizer={key: value for key, value in K_FOR_1.optimizer.items() if key != "rate"},
    per_data_set={
        **K_FOR_1.per_data_set,
        "optimizer.rate": "the best of 0.0045 to 0.45 in factors of 3, a small one for a whole network",
    },
)
WARM_UP = {"schedule.warm_up_rounds": "10 of 100 epochs, so 10 * training images / (batch_size * accumulate)"}
DTL = Recipe(
    source="Fu, Zhu and Wu, 'DTL', AAAI 2024, with the training scripts of its official code",
    optimizer={"name": "adamw", "weight_decay": 0.05},
    schedule={"name": "cosine"},
    per_data_set={"optimizer.rate": "1e-4 to 1e-2 with batches of 32, the best on validation data", **WARM_UP},
)
MIST = Recipe(
    source="Tang, Fu and Wu, 'Minimal Interaction Separated Tuning', CVPR 2025",
    # The paper states no weight decay and no warm-up. The warm-up is taken from DTL, which has the same authors.
    optimizer={"name": "adam", "weight_decay": 0.0},
    schedule={"name": "cosine"},
    per_data_set={"optimizer.rate": "the best on validation data, with batches of 32", **WARM_UP},
)
PARASITE = Recipe(
    source="Alini, Sturim, Brady and Khorrami, 'Parasite Networks', 2024",
    optimizer={"name": "adamw"},
    schedule={"name": "cosine"},
    per_data_set={
        "optimizer.rate": "the best of 0.0001 to 50 for 256 images (rate_rule: per_256_images), on validation data",
        "optimizer.weight_decay": "the best of 0, 1e-4, 1e-3 and 1e-2, on validation data",
        **WARM_UP,
    },
)

RECIPES: dict[str, Recipe] = {
    "scale_bias": K_FOR_1,
    "depthwise": K_FOR_1,
    "last_layer": K_FOR_1,
    "norm_statistics": K_FOR_1,
    "full": K_FOR_1_WHOLE_NETWORK,
    "shared": K_FOR_1,
    "dtl": DTL,
    "dtl_plus": DTL,
    "dtl_plus_star": DTL,
    "mist": MIST,
    "parasite": PARASITE,
}
"""Patch method -> the recipe of its paper."""


def fill_in(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Fill in the missing parts of `optimizer` and `schedule` from the recipe of the tasks' patch methods.

    If `optimizer` lacks its name or its rate, the rest comes from the recipe. If it names another optimizer than the
    recipe, it stays as it is. A schedule without a name is filled in. A missing schedule is filled in if the optimizer
    was.

    Args:
        raw: the job spec as plain data, before its validation. Values of the wrong shape are returned unchanged.
    Returns:
        The job spec, filled in, and its gaps: key that the user has to set -> why. The reason is empty if the key may
        be missing only because the tasks' methods cannot be read, which is the problem to report.
    """
    filled = {key: value for key, value in raw.items() if key not in ("optimizer", "schedule") or value is not None}
    optimizer, schedule = filled.get("optimizer", {}), filled.get("schedule", {})
    if not (isinstance(optimizer, Mapping) and isinstance(schedule, Mapping)):
        return filled, {}
    takes_optimizer = not {"name", "rate"} <= optimizer.keys()
    takes_schedule = bool(schedule) and "name" not in schedule
    if not (takes_optimizer or takes_schedule):
        return filled, {}
    methods = _methods(raw.get("tasks"))
    if not methods:
        return filled, dict.fromkeys(("optimizer", "optimizer.rate", "schedule"), "")
    without = "optimizer" if takes_optimizer else "schedule"
    refusal = _refusal(methods)
    if refusal is not None:
        change = f"Set the whole {without} in the spec: its name and all keys that it requires."
        return filled, {without: f"{refusal}. {change}"}
    recipe = RECIPES[methods[0]]
    if takes_optimizer and optimizer.get("name", recipe.optimizer["name"]) == recipe.optimizer["name"]:
        filled["optimizer"] = {**recipe.optimizer, **optimizer}
        takes_schedule = takes_schedule or not schedule
    if takes_schedule:
        filled["schedule"] = {**recipe.schedule, **schedule}
    gaps = {}
    for key, rule in recipe.per_data_set.items():
        section, _, name = key.partition(".")
        if filled.get(section) != raw.get(section) and name not in filled[section]:
            gaps[key] = (
                f"this key is required, because the recipe of method '{methods[0]}' sets it for each data set: "
                f"{rule} ({recipe.source}). Set {section}: {{{name}: ...}}, or a whole {section} of your own."
            )
    return filled, gaps


def _methods(tasks: Any) -> list[str]:
    """Return the patch methods of all tasks without repetition, with combinations split into their methods.

    The list is empty if the method of any task cannot be read.
    """
    if not isinstance(tasks, Sequence) or not all(
        isinstance(task, Mapping) and isinstance(task.get("method"), str) for task in tasks
    ):
        return []
    return list(dict.fromkeys(name for task in tasks for name in task["method"].split("+")))


def _refusal(methods: Sequence[str]) -> str | None:
    """Return why the methods have no recipe in common, or None if they have one."""
    unknown = [method for method in methods if method not in RECIPES]
    if unknown:
        return f"method {quoted(unknown[0])} has no recipe; the methods with one are {', '.join(RECIPES)}"
    other = next((method for method in methods if RECIPES[method] != RECIPES[methods[0]]), None)
    return None if other is None else f"methods '{methods[0]}' and '{other}' have different recipes"
