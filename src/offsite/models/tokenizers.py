"""A folder -> its tokenizer, and how long a row its model can read."""

from pathlib import Path
from typing import TYPE_CHECKING

from offsite.errors import IncompatibleError
from offsite.models.library_calls import OFFLINE, incompatible, quiet
from offsite.models.model_folder import check_folder, unwrapped_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder.

    Raises:
        IncompatibleError: there is none, it asks for foreign code, or it has no end token.
    """
    from transformers import AutoTokenizer

    check_folder(folder)
    with quiet(), incompatible(folder):
        given = {"config": load_config(folder)} if unwrapped_config(folder)[1] else {}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **given, **OFFLINE)
    if tokenizer.eos_token_id is None:
        raise IncompatibleError(
            f"the tokenizer in {folder} has no end token, so no answer could ever end",
            next_step='name one as "eos_token" in its tokenizer_config.json',
        )
    return tokenizer


def context_length(folder: Path) -> int | None:
    """Positions that the model in a folder has, by its config; None where it does not say."""
    check_folder(folder)
    with quiet(), incompatible(folder):
        config = load_config(folder)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_config(folder: Path) -> "PretrainedConfig":
    """The config of a folder as transformers has it; of a declared one that of its family."""
    from transformers import AutoConfig

    config, declared = unwrapped_config(folder)
    loaded: PretrainedConfig
    loaded = AutoConfig.for_model(**config) if declared else AutoConfig.from_pretrained(folder, **OFFLINE)
    return loaded
