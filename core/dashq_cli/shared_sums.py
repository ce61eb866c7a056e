"""The sums of calibration that members of a sweep have in common: the first to form them keeps them for the others."""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dashq.errors import PlanError
from dashq.quantizing.kept import bytes_to_keep, dependence, remove_kept
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq_cli.members import Member, Members
from dashq_cli.plan_table import size

FOLDER = "calibration"  # in that of the sweep, until all members are done
ROOM = 0.5  # of the free disk, at most, that sums may take


@dataclass(frozen=True)
class SharedSums:
    """The members that learn the same, by their numbers, and the `folder` in which it is kept for them.

    `sentence` says so; it is empty where no members learn the same, or none that can keep it.
    """

    folder: Path
    groups: Mapping[int, Sequence[Member]]
    sentence: str = ""

    @classmethod
    def of(cls, every: Members, planned: Mapping[int, Sequence[LayerPlan]]) -> "SharedSums":
        """Of `every` member of a sweep, some of which are `planned`, by their numbers."""
        alike: dict[str, list[Member]] = defaultdict(list)
        for member in every:
            # Where the recipe names a folder, members share by themselves.
            if member.recipe.calibration.propagate == "original" and not member.recipe.keep:
                alike[dependence(member.recipe)].append(member)
        folder = every.folder / FOLDER
        groups, needed = list[list[Member]](), 0
        for members in alike.values():
            plans = [planned[member.number] for member in members if member.number in planned]
            if len(members) > 1 and plans:
                try:
                    needed += bytes_to_keep(plans[0])
                except PlanError:  # a stranger's estimator, whose state no file can hold
                    continue
                groups.append(members)
        if not groups:
            return cls(folder, {})
        listed = "; ".join(", ".join(str(member.number) for member in members) for members in groups)
        free = shutil.disk_usage(next(path for path in folder.absolute().parents if path.exists())).free
        if needed > ROOM * free:
            sentence = (
                f"members {listed} learn the same of the text, which is not shared: it could take {size(needed)} on "
                f"disk, where {size(free)} are free"
            )
            return cls(folder, {}, sentence)
        sentence = (
            f"members {listed} learn the same of the text: the first one keeps it in {folder}, up to {size(needed)} on "
            "disk, until all members are done"
        )
        return cls(folder, {member.number: members for members in groups for member in members}, sentence)

    def recipe_of(self, member: Member, overwrite: bool) -> Recipe:
        """The recipe to run a member with: it keeps or takes sums where that is of use, now or later."""
        others = [other for other in self.groups.get(member.number, ()) if other.number != member.number]
        waiting = [other for other in others if overwrite or not other.is_done]
        if waiting or (others and self.folder.is_dir()):
            return member.recipe.keeping(self.folder)
        return member.recipe

    def give_up(self, every: Iterable[Member]) -> None:
        """Remove what is kept, once all members are done."""
        if all(member.is_done for member in every):
            remove_kept(self.folder)
