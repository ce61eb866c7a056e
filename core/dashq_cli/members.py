"""The members of a sweep: a recipe and a folder for each, planned together and run one after the other."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import typer
import yaml
from rich.console import Console

from dashq.errors import DashqError, OutputError, PlanError
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for
from dashq.pipeline import run
from dashq.quantizing.opening import check_start, open_model, plan_model
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.recipe.variations import Variation, in_words
from dashq.registry import Registry
from dashq.results.files import write_text
from dashq.results.fingerprint import inputs_of
from dashq.results.folder import ANALYSIS, check_folder, is_finished, make_folder
from dashq.results.lock import FolderInUseError
from dashq.starting import load_recipe
from dashq_cli.line_log import log_for

POLL_SECONDS = 10.0  # between looks at a member that another process runs


@dataclass(frozen=True)
class Member:
    """One variation of a recipe, whose output is the folder of its name in that of the sweep; numbers count from 1."""

    number: int
    variation: Variation
    recipe: Recipe

    @property
    def is_done(self) -> bool:
        """True where its result is whole."""
        return is_finished(self.recipe.output)

    @property
    def recipe_file(self) -> Path:
        """The file beside its result with its recipe, before anything is chosen by measurement."""
        return self.recipe.output.with_name(f"{self.recipe.output.name}.yaml")

    @property
    def text(self) -> str:
        """The content of that file."""
        return yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def __str__(self) -> str:
        return ", ".join(f"{key}={in_words(value)}" for key, value in self.variation.values.items())


@dataclass(frozen=True)
class Members:
    """Some members of a sweep in a `folder`, in the order of their variations."""

    folder: Path
    own: Sequence[Member]

    @classmethod
    def of(
        cls, path: Path, varied: Sequence[Variation], settings: Sequence[str], folder: Path, registry: Registry
    ) -> Self:
        """A member for each variation of the recipe at `path`; a `RecipeError` where one of them is no recipe."""
        own = []
        for number, variation in enumerate(varied, start=1):
            recipe = load_recipe(path, registry, [*settings, *variation.settings])
            own.append(Member(number, variation, recipe.model_copy(update={"output": folder / variation.name})))
        return cls(folder, own)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def only(self, index: int) -> Self:
        """The member of that index alone."""
        return type(self)(self.folder, [self.own[index]])

    def plan(self, overwrite: bool) -> list[tuple[LayerPlan, ...]]:
        """The plans of each member; a `PlanError` with a line for each member that cannot be run.

        Where a member is measured first, its plan is that before the measurement.
        """
        plans, reasons, checked = [], [], []
        for member in self.own:
            recipe = member.recipe
            try:
                _check_recipe_file(member, overwrite)
                model = open_model(recipe)
                if recipe.measures:
                    choices_for(recipe, model)
                plans.append(plan_model(recipe, model))
                check_folder(recipe.output, recipe.format_files)
                text = (recipe.calibration, recipe.tuner)
                if text not in checked:  # reading it takes seconds
                    check_start(recipe, model)
                    checked.append(text)
            except DashqError as error:
                reasons.append(f"{member}: {error}")
        if reasons:
            raise PlanError("\n".join(reasons))
        return plans

    def run(
        self, console: Console, quiet: bool, log_json: bool, overwrite: bool, recipe_of: Callable[[Member], Recipe]
    ) -> list[str]:
        """Run the members that are not finished, those last that other processes run now; returns those that failed.

        `recipe_of` has the recipe to run a member with. A member that fails is named, and the others are run all the
        same.
        """
        failures: list[str] = []
        waiting = list(self.own) if overwrite else [member for member in self.own if not member.is_done]
        while waiting:
            in_use = []
            for member in waiting:
                if member.is_done and not overwrite:  # by another process, in the meantime
                    continue
                console.rule(f"member {member.number}: {member}", align="left")
                try:
                    self._run(member, recipe_of(member), quiet, log_json, overwrite)
                except FolderInUseError as error:
                    console.print(f"{error}; this one comes last", highlight=False, markup=False)
                    in_use.append(member)
                except DashqError as error:
                    typer.echo(f"dashq: {member}: {error}", err=True)
                    failures.append(str(member))
            if in_use == waiting:
                time.sleep(POLL_SECONDS)
            waiting = in_use
        return failures

    def _run(self, member: Member, recipe: Recipe, quiet: bool, log_json: bool, overwrite: bool) -> None:
        make_folder(self.folder)
        write_text(member.recipe_file, member.text)
        if member.recipe.measures:
            self._share_measurement(member)
        with log_for(quiet, log_json) as log:
            run(recipe, log.hear, overwrite)

    def _share_measurement(self, member: Member) -> None:
        """Give a member the measurement of another one that answers for it, where it has none."""
        recipe = member.recipe
        others = [other for other in self.own if (other.recipe.output / ANALYSIS).exists()]
        if member in others or not others:
            return
        model = open_model(recipe)
        choices, inputs = choices_for(recipe, model), inputs_of(model, recipe)
        for other in others:
            analysis = Analysis.load(other.recipe.output)
            if analysis and not analysis.misfits(recipe, choices, inputs):
                make_folder(recipe.output)
                analysis.save(recipe.output)
                return


def _check_recipe_file(member: Member, overwrite: bool) -> None:
    """Refuse a member that was begun as another one by the same name."""
    path = member.recipe_file
    if path.exists() and not overwrite and path.read_text(encoding="utf-8") != member.text:
        raise OutputError(
            f"{path} is another recipe than this member's: --overwrite runs it anew, --output names another folder"
        )
