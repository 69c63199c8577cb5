"""`speft merge`: base model and adapter in, plain model out."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import AdapterError
from ..files import check_output, new_output, path_of, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="folder or hub id of the base model (default: as recorded in the adapter)"
    )
    parser.add_argument("--adapter", required=True, help="folder of the adapter, or of its run")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist yet")


def run(args: argparse.Namespace) -> int:
    from ..finetune.methods import ABOUT
    from ..finetune.models import MeanPoolClassifier, quiet_transformers
    from ..finetune.trained import about_of, load_trained

    output = path_of("output", args.output)
    check_output(output)
    folder = adapter_folder(args.adapter)
    about = about_of(folder)
    trained = load_trained(folder, model=args.model)
    model = trained.model
    with quiet_transformers(), new_output(output) as draft:
        model.save_pretrained(draft)  # type: ignore[operator]
        trained.tokenizer.save_pretrained(draft)
        write_json(draft / ABOUT, about)
    name = type(model).__name__
    print(f"{output}: {name} with the adapter of {folder} merged in")
    if isinstance(model, MeanPoolClassifier):
        print(
            "transformers has no class of that kind; load it with\n"
            f"  from speft_kernels.finetune import {name}\n"
            f"  model = {name}.from_pretrained({str(output)!r})"
        )
    return 0


def adapter_folder(given: str) -> Path:
    """The adapter's folder where that of its run was given.

    Raises AdapterError, with the reason, for one that another library or method wrote.
    """
    from ..finetune.folder import PEFT_FILE
    from ..finetune.trained import WHOLE_FILE, trained_folder

    folder = trained_folder(path_of("adapter", given))
    if (folder / PEFT_FILE).is_file():
        raise AdapterError(
            f"{folder} is an adapter of PEFT; merge it with PEFT: "
            "speft_kernels.finetune.load_trained(folder).model.merge_and_unload()"
        )
    if (folder / WHOLE_FILE).is_file():
        raise AdapterError(f"{folder} is a whole model; there is nothing to merge")
    return folder
