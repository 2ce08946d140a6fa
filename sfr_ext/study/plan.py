"""A study's YAML file: which runs it asks for, each with its options and its folder."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..train.config import ARMS, LARGEST_SEED, TrainConfig, flag, options
from ..train.errors import TrainError, UsageError
from ..train.models import RESNETS, build_model, refuse_unknown, refuse_unknown_layers
from ..train.parser import from_options
from ..train.yaml_names import NoDuplicates
from .names import TAKEN

SHIFT = "shift_seeds"  # of an arm: trains with other seeds than those that it is paired by
# What the study itself decides for each run.
_OWN = ("out", "resume", "overwrite", "seed", "progress")
_MOST_SEEDS = 10_000  # of a setting
_KEYS = ("name", "about", "judged_by", "references", "seeds", "common", "arms", "settings")
_KEYS_OF_SETTING = ("about", "arms", "seeds", "options")
JUDGES = ("test", "validation")


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    setting: str
    arm: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """What a study's file says, with every run that follows from it."""

    name: str
    about: str
    judged_by: str
    references: tuple[str, ...]
    settings: dict[str, str]  # their names, and what is said of them
    runs: tuple[Run, ...]

    def outline(self) -> dict[str, Any]:
        """What a report needs beside the results, as values of JSON: arms and seeds by setting, in their order."""
        settings: dict[str, Any] = {}
        for name, about in self.settings.items():
            runs = [run for run in self.runs if run.setting == name]
            arms = list(dict.fromkeys(run.arm for run in runs))
            settings[name] = {"about": about, "arms": arms, "seeds": sorted({run.seed for run in runs})}
        kept = {"name": self.name, "about": self.about, "judged_by": self.judged_by}
        return {**kept, "references": list(self.references), "settings": settings}


def read_study(path: Path, out: Path, given: Mapping[str, Any] | None = None) -> Study:
    """The study in a YAML file.

    Args:
        path: of the file.
        out: the folder of its runs: ``out / setting / arm / seed-N``.
        given: options of ``sfr-ext train`` that win over the file's, in every run.

    Raises:
        TrainError: the file cannot be read.
        UsageError: it says what cannot be; one line for each mistake.
    """
    reader = _Reader(path, out.absolute(), dict(given or {}))
    study = reader.read(_load(path))
    if reader.mistakes:
        raise UsageError("\n".join(f"{path}: {mistake}" for mistake in reader.mistakes))
    assert study is not None
    return study


def _load(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, NoDuplicates)  # noqa: S506
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


class _Reader:
    """Reads what can be read and collects what is wrong with the rest."""

    def __init__(self, path: Path, out: Path, given: dict[str, Any]) -> None:
        self.path, self.out, self.given = path, out, given
        self.mistakes: list[str] = []
        self.shifts: dict[str, int] = {}

    def read(self, content: Any) -> Study | None:
        if not isinstance(content, dict):
            self.mistakes.append(f"expected a mapping with settings and arms, got {_kind(content)}")
            return None
        self._known(content, _KEYS, "the study")
        common = self._options(content.get("common"), "common")
        arms = self._arms(content.get("arms"), "arms")
        seeds = self._seeds(content.get("seeds", 1), "seeds")
        settings = content.get("settings")
        if not isinstance(settings, dict) or not settings:
            self.mistakes.append(f"settings: expected a mapping from names to options, got {_kind(settings)}")
            settings = {}
        runs: list[Run] = []
        for name, setting in settings.items():
            runs += self._setting(name, setting, common, arms, seeds)
        judged_by = content.get("judged_by", "test")
        if judged_by not in JUDGES:
            self.mistakes.append(f"judged_by: expected one of {', '.join(JUDGES)}, got {judged_by!r}")
        if judged_by == "validation":
            for where in dict.fromkeys(f"{run.setting}/{run.arm}" for run in runs if run.config.validation == 0):
                self.mistakes.append(f"{where}: judged_by: validation needs the option validation, a share above 0")
        references = self._references(content, arms)
        if self.mistakes:
            return None
        about = {name: str((setting or {}).get("about") or "") for name, setting in settings.items()}
        title = str(content.get("name") or self.path.stem)
        return Study(title, str(content.get("about") or ""), judged_by, references, about, tuple(runs))

    def _references(self, content: Mapping[str, Any], arms: Mapping[str, Any]) -> tuple[str, ...]:
        references = content.get("references", [name for name in ("ce", "ls") if name in arms])
        if not isinstance(references, list) or not all(isinstance(name, str) for name in references):
            came = "nothing" if references is None else repr(references)
            self.mistakes.append(f"references: expected a list of names of arms, got {came}")
            return ()
        for name in dict.fromkeys(references):
            if references.count(name) > 1:
                self.mistakes.append(f"references: {name!r} is there twice")
            if name not in arms:
                self.mistakes.append(f"references: there is no arm {name!r}{_near(name, list(arms))}")
        return tuple(references)

    def _setting(
        self, name: Any, setting: Any, common: dict[str, Any], arms: dict[str, dict[str, Any]], seeds: tuple[int, ...]
    ) -> Iterator[Run]:
        where = f"settings: {name}"
        if not self._good_name(name, "settings"):
            return
        if name in TAKEN:
            taken = ", ".join(TAKEN)
            self.mistakes.append(f"settings: expected a name that study and report do not use ({taken}), got {name!r}")
            return
        if setting is not None and not isinstance(setting, dict):
            self.mistakes.append(f"{where}: expected a mapping, got {_kind(setting)}")
            return
        setting = setting or {}
        self._known(setting, _KEYS_OF_SETTING, where)
        own = self._options(setting.get("options"), f"{where}: options")
        chosen = self._chosen_arms(setting.get("arms"), arms, where)
        if "seeds" in setting:
            seeds = self._seeds(setting["seeds"], f"{where}: seeds")
        configs: dict[str, TrainConfig] = {}
        for arm, more in chosen.items():
            named = {**common, **own, **arms[arm], **more, **self.given}
            config = self._config(named, f"{where}, arm {arm}")
            shift = self.shifts[arm]
            if shift and seeds and max(seeds) + shift > LARGEST_SEED:
                self.mistakes.append(
                    f"{where}, arm {arm}: {SHIFT}: expected seeds of at most {LARGEST_SEED}, got {max(seeds)} + {shift}"
                )
            elif config is not None:
                configs[arm] = config
        for seed in seeds:  # outermost: what is there of an unfinished study can be compared
            for arm, config in configs.items():
                folder = self.out / name / arm / f"seed-{seed}"
                yield Run(name, arm, seed, replace(config, seed=seed + self.shifts[arm], out=folder))

    def _config(self, named: dict[str, Any], where: str) -> TrainConfig | None:
        before = len(self.mistakes)
        if (folder := named.get("data_dir")) and isinstance(folder, (str, Path)):  # a worker may stand elsewhere
            named = {**named, "data_dir": str(Path(folder).expanduser().absolute())}
        try:
            config = from_options({**named, "progress": False})
            for name in ("devices", "nodes"):
                if (came := getattr(config, name)) not in (1, "1"):
                    wanted = "1 in a study, which runs several runs at a time instead (--jobs; --gpus of Ray)"
                    raise TrainError(f"{flag(name)} must be {wanted}, got {came!r}")
            _look_into_network(config.arch, config.pretrained, config.layers)
            return config
        except TrainError as error:
            # An option that is wrong for all arms is said once, where it stands.
            if not any(str(error) in mistake for mistake in self.mistakes[:before]):
                self.mistakes.append(f"{where}: {error}")
            return None

    def _arms(self, arms: Any, where: str) -> dict[str, dict[str, Any]]:
        """By name; a name of `sfr-ext train` needs no options."""
        if isinstance(arms, list):
            for name in sorted({str(name) for name in arms if arms.count(name) > 1}):
                self.mistakes.append(f"{where}: {name!r} is there twice")
            arms = dict.fromkeys(map(str, arms))
        if not isinstance(arms, dict) or not arms:
            self.mistakes.append(f"{where}: expected names, or a mapping from names to options, got {_kind(arms)}")
            return {}
        found = {}
        for name, own in arms.items():
            if not self._good_name(name, where):
                continue
            own = dict(own) if isinstance(own, dict) else own
            shift = own.pop(SHIFT, 0) if isinstance(own, dict) else 0
            if not isinstance(shift, int) or isinstance(shift, bool) or shift < 0:
                self.mistakes.append(f"{where}: {name}: {SHIFT}: expected a whole number from 0, got {shift!r}")
                shift = 0
            self.shifts[name] = shift
            own = self._options(own, f"{where}: {name}")
            if "arm" not in own and name not in ARMS:
                near = _near(name, list(ARMS))
                self.mistakes.append(f"{where}: {name!r} is no arm of sfr-ext train; say which by `arm:`{near}")
                continue
            found[name] = {"arm": name, **own}
        return found

    def _chosen_arms(self, chosen: Any, arms: dict[str, dict[str, Any]], where: str) -> dict[str, dict[str, Any]]:
        """Of a setting: all, those that it lists, or those that it gives further options."""
        if chosen is None:
            return {name: {} for name in arms}
        if isinstance(chosen, list):
            for name in sorted({str(name) for name in chosen if chosen.count(name) > 1}):
                self.mistakes.append(f"{where}: arms: {name!r} is there twice")
            chosen = dict.fromkeys(map(str, chosen))
        if not isinstance(chosen, dict) or not chosen:
            self.mistakes.append(f"{where}: arms: expected names of arms, got {_kind(chosen)}")
            return {}
        found = {}
        for name, more in chosen.items():
            if name not in arms:
                self.mistakes.append(f"{where}: arms: there is no arm {name!r}{_near(name, list(arms))}")
                continue
            found[name] = self._options(more, f"{where}: arms: {name}")
        return found

    def _options(self, named: Any, where: str) -> dict[str, Any]:
        """Options by name, without those that do not exist or are the study's own to set."""
        if named is None:
            return {}
        if not isinstance(named, dict):
            self.mistakes.append(f"{where}: expected a mapping from options to values, got {_kind(named)}")
            return {}
        good = {}
        for name, value in named.items():
            if name in _OWN:
                self.mistakes.append(f"{where}: {name!r} is set by the study itself, for each run")
            elif name not in options():
                self.mistakes.append(f"{where}: there is no option {name!r}{_near(name, list(options()))}")
            else:
                good[name] = value
        return good

    def _seeds(self, seeds: Any, where: str) -> tuple[int, ...]:
        """A number of seeds from 0 on, or a list of them."""
        if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
            if seeds > _MOST_SEEDS:
                self.mistakes.append(f"{where}: expected at most {_MOST_SEEDS} seeds, got {seeds}")
            return tuple(range(min(seeds, _MOST_SEEDS)))
        whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
        if not whole or not seeds or min(seeds) < 0:
            self.mistakes.append(f"{where}: expected a number from 1, or a list of whole numbers from 0, got {seeds!r}")
            return ()
        if max(seeds) > LARGEST_SEED:
            self.mistakes.append(f"{where}: expected seeds of at most {LARGEST_SEED}, got {max(seeds)}")
            return ()
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            self.mistakes.append(f"{where}: {twice} is there twice")
        return tuple(dict.fromkeys(seeds))

    def _known(self, content: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
        for key in content:
            if key not in keys:
                hint = "; options of train go under `options:`" if "options" in keys and key in options() else ""
                self.mistakes.append(f"{where}: unknown key {key!r}, expected {', '.join(keys)}{hint}")

    def _good_name(self, name: Any, where: str) -> bool:
        """Whether it can be a folder's."""
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            return True
        self.mistakes.append(f"{where}: expected a name of letters, digits, and . + - _, got {name!r}")
        return False


@cache
def _look_into_network(arch: str, pretrained: bool, layers: tuple[str, ...] | None) -> None:
    """What can be said of network and layers without building a large one."""
    refuse_unknown(arch, pretrained)
    if arch in RESNETS and layers is not None:
        refuse_unknown_layers(layers, build_model(arch, 3, 10)[0])


def _near(name: Any, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=3)
    return f"; near to it: {', '.join(close)}" if close else f" (there is {', '.join(known)})" if known else ""


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == {} or value == [] else f"a {type(value).__name__}"
