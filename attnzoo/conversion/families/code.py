"""Code that goes beside the weights where no stock class holds a model with fewer KV heads.

It is read by `from_pretrained(folder, trust_remote_code=True)`, and needs transformers alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnzoo.conversion.errors import Refusal

# The files stand with all that knows transformers, and are only copied from here.
_FOLDER = Path(__file__).parents[2] / "hf" / "remote"


@dataclass(frozen=True)
class Code:
    """A flat file with a config class and model classes.

    `classes` has, for each architecture of the family, the Auto class that loads it and its class in the file.
    """

    file: str
    config: str
    classes: Mapping[str, tuple[str, str]]

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return _FOLDER / self.file

    @property
    def module(self) -> str:
        """What Python calls the file where attnzoo is installed."""
        return f"attnzoo.hf.remote.{self.path.stem}"

    @property
    def auto_map(self) -> dict[str, str]:
        """What config.json calls the classes."""
        autos = {auto: f"{self.path.stem}.{name}" for auto, name in self.classes.values()}
        return {"AutoConfig": f"{self.path.stem}.{self.config}"} | autos

    def describe(self, config: dict[str, Any], model_type: str) -> dict[str, Any]:
        """The config with the file's model type and architectures; Refusal for an architecture that it has not."""
        names = config.get("architectures") or list(self.classes)[:1]
        for name in names:
            if name not in self.classes:
                raise Refusal(
                    f"no stock class holds {name} with fewer KV heads, and the code that is written beside the weights "
                    f"has {', '.join(self.classes)} alone"
                )
        return config | {"model_type": model_type, "architectures": [self.classes[name][1] for name in names]}
