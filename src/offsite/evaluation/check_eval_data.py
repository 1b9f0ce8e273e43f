"""`offsite eval --check`: reads the held-out rows or pictures as an evaluation does, and describes them.

No model is loaded, only its tokenizer or image processor.
"""

from pathlib import Path

from offsite.config import EvalSpec
from offsite.data.check_data import PictureCheck, TextCheck, check_pictures, check_text
from offsite.data.data_files import DataPaths
from offsite.data.pictures.picture_files import load_processor
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.data.row import RowForm
from offsite.data.tokens import open_tokenizer
from offsite.models.image_encoder import sees_images
from offsite.models.model_folder import model_settings
from offsite.models.tokenizers import context_length


def check_eval_data(model: Path, data: DataPaths, spec: EvalSpec) -> TextCheck | PictureCheck:
    """Read all rows or pictures that an evaluation would read, and describe them.

    Args:
        model: the folder of the model.
        data: the data set.
        spec: the settings of the evaluation.

    Raises:
        DataError: rows are invalid, or no row is left.
        IncompatibleError: the tokenizer or image processor does not fit the model.
        UsageError: the folder is not a checkpoint.
    """
    if sees_images(model_settings(model)):
        listed = read_pictures(data, part="held out", columns=spec.columns)
        return check_pictures(data, Pictures(listed, load_processor(model), skip_bad=spec.skip_bad))
    longest = min(spec.max_length, context_length(model) or spec.max_length)
    with open_tokenizer(model) as tokenizer:
        return check_text(
            data,
            tokenizer,
            model,
            form=RowForm(spec.columns or {}, spec.chosen),
            part="held out",
            max_length=longest,
            long_rows=spec.long_rows,
        )
