"""What transformers, safetensors and torch raise for a wrong name or file, as a UserError of one line with a hint."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from safetensors import SafetensorError

from lengthen.errors import out_of_memory
from lengthen.records import UserError


@contextmanager
def explained(name: str, what: str = "model", own_code: bool = False) -> Iterator[None]:
    """What transformers raises for files or names that are wrong, as a UserError.

    own_code: the model's repository may bring its own, whose mistakes are not ours.
    """
    try:
        yield
    except (AttributeError, TypeError, ImportError, NameError, NotImplementedError) as error:
        if isinstance(error, ImportError) and "cannot import name" not in str(error):
            hint = "pip install -r requirements.txt"
            raise UserError(f"{name} needs a package: {first_line(error)}", hint) from None
        if not own_code:
            raise  # a defect of ours or of transformers
        raise UserError(
            f"{name}: its own code does not run with transformers {transformers.__version__}"
            f" ({type(error).__name__}: {first_line(error)})",
            "it was written for another release: take a model that transformers knows without --trust-remote-code",
        ) from None
    except SafetensorError as error:
        raise UserError(f"a weight file of {name} is damaged: {error}", "copy or download it again") from None
    except RuntimeError as error:
        if out_of_memory(error):
            raise UserError(f"{name} does not fit into memory", "--quantize nf4, or a smaller model") from None
        if "ignore_mismatched_sizes" not in str(error):
            raise  # a defect, or the machine's: not a mistake of the user
        raise UserError(
            f"{name}: the weights have other shapes than config.json says", "copy both from the same place"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise _mistake(name, what, error) from None


def _mistake(name: str, what: str, error: Exception) -> UserError:
    chain: BaseException | None = error
    kinds = set()  # of errors; huggingface_hub's reason is often not the last
    while chain:
        kinds.add(type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    text = str(error)
    if kinds & {"GatedRepoError"}:
        return UserError(f"{name} is gated on the hub", "accept its licence on its page there, then: hf auth login")
    if kinds & {"RepositoryNotFoundError"}:
        return UserError(
            f"the hub has no model {name}, or it is private", "check the id; for a private one: hf auth login"
        )
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        return UserError(
            f"{name} is not a local folder and the hub cannot be reached",
            "check the network, or pass a folder; without network: --model smollm2",
        )
    if "trust_remote_code" in text:
        return UserError(f"{name} brings its own code", "read it, and pass --trust-remote-code if you trust it")
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        version = transformers.__version__
        return UserError(
            f"transformers {version} does not know the model type of {name}", "pip install --upgrade transformers"
        )
    if "Unrecognized configuration class" in text:
        return UserError(f"{name} is not a causal language model", "take an instruct or chat model")
    if "no file named" in text:
        return UserError(
            f"{name} has no safetensors weights", "other formats are pickles, which can run code: convert it"
        )
    return UserError(f"the {what} {name} cannot be loaded: {first_line(error)}", "is the folder or download complete?")


def logits_not_finite(model: transformers.PreTrainedModel) -> UserError:
    """What to raise where a model whose weights are finite (models/loading.py) computes NaN or infinity."""
    name = model.name_or_path or type(model).__name__
    if model.dtype == torch.float16:
        return UserError(
            f"{name}: the logits are not finite, its values exceed 65,504, the largest that float16 has",
            "--dtype bfloat16, or float32",
        )
    dtype = str(model.dtype).removeprefix("torch.")
    wider = "--dtype float32, or " if model.dtype == torch.bfloat16 else ""
    return UserError(
        f"{name}: the logits are not finite in {dtype}: its weights, or those of the adapter, are damaged",
        f"{wider}copy or download them again",
    )


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
