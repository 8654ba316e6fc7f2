"""The stage in NeMo Automodel: a collate function and a recipe that its YAML names.

Written for NeMo Automodel 0.7.0, which calls `collate_fn._target_` with examples and a processor,
and makes its recipe from the class that `recipe` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from unittest import mock

from nemo_automodel._transformers import auto_model
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.components.datasets.vlm.collate_fns import COLLATE_FNS
from nemo_automodel.recipes.vlm import finetune
from transformers import AutoConfig

from mrope.collate.collator import MRopeCollator
from mrope.columns import Columns
from mrope.hf import attach
from mrope.spec.spec import MRopeSpec
from mrope.towers import VisionSpec


def collate(examples: Sequence[Columns], processor: object, model: str) -> Columns:
    """Collate as Automodel does for this processor, then add positions and tower tensors.

    Args:
        examples: rows with `conversation`.
        processor: given by Automodel.
        model: the model's folder, or its name on the Hub.

    Returns:
        Automodel's batch, with what `MRopeCollator` adds to a padded one.

    Raises:
        MRopeError: an unknown family, or examples that `MRopeCollator` refuses.
        OSError: no config of `model`.
    """
    own = COLLATE_FNS.get(type(processor).__name__, COLLATE_FNS["default"])
    batch: Columns = MRopeCollator(partial(own, processor=processor), *_numbers(model))(examples)
    return batch


class FinetuneRecipeForVLM(finetune.FinetuneRecipeForVLM):  # type: ignore[misc]
    """Automodel's recipe, whose model is attached before it is sharded; for `collate`'s batches."""

    def setup(self) -> None:
        """Build all components, as Automodel does.

        Raises:
            MRopeError: `mrope.hf.attach` refuses the model.
        """
        # Called for each model that is made, before adapters, sharding and compilation.
        name = "apply_model_runtime_patches"
        own = getattr(auto_model, name)
        with mock.patch.object(auto_model, name, lambda *made: attach(own(*made))):
            super().setup()


@lru_cache
def _numbers(model: str) -> tuple[MRopeSpec, VisionSpec]:
    config = AutoConfig.from_pretrained(model)
    return MRopeSpec.from_config(config), VisionSpec.from_config(config)


if __name__ == "__main__":  # the `automodel` command runs a recipe's file by torchrun
    recipe = FinetuneRecipeForVLM(parse_args_and_load_config())
    recipe.setup()
    recipe.run_train_validation_loop()
