"""The command line: `pykern COMMAND …`. Each command imports what it needs and no more, so that `doctor` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is loaded, which the commands do. Threads that spin while they wait take the processor from
# those that work: with two of them on a busy machine, tiny tensors become a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def doctor(args: list[str]) -> int | None:
    """What this machine can run: torch, Triton, the native library, compilers, GPUs."""
    from pykern.doctor import main as diagnose

    return _with_options("doctor", diagnose, args)


def ops(args: list[str]) -> int | None:
    """The ops, and which backend serves each here."""
    from pykern.testing import commands

    return _with_options("ops", commands.ops, args)


def check(args: list[str]) -> int | None:
    """Run the generated tests of ops."""
    from pykern.testing import commands

    return _with_options("check", commands.check, args)


def bench(args: list[str]) -> int | None:
    """Compare the speed of ops with torch and with the limits of the machine."""
    from pykern.testing import commands

    return _with_options("bench", commands.bench, args)


def traffic(args: list[str]) -> int | None:
    """Count what kernels move through memory, over what their ops must move."""
    from pykern.testing import traffic as module

    return _with_options("traffic", module.traffic, args)


def ledger(args: list[str]) -> int | None:
    """Compile kernels for GPUs that are not here, and compare registers, spills and widths with what is recorded."""
    from pykern.testing import ledger as module

    return _with_options("ledger", module.ledger, args)


def gpu(args: list[str]) -> int | None:
    """Run what needs a GPU: conformance, tests, sanitizer, repeats, benchmarks."""
    from pykern.testing.gpu.run import main

    return main(args)


def pretrain(args: list[str]) -> None:
    """Train a model on text, or go on with --resume RUN."""
    from pykern.train.config import from_dict, read_config
    from pykern.train.pretrain_config import PretrainConfig, preset

    chosen, args = _sources(args, "preset", "config", "resume")
    if chosen.resume:
        path = chosen.resume / "config.json"
        base = dataclasses.replace(from_dict(PretrainConfig, read_config(path), str(path)), out=chosen.resume)
    else:
        settings = read_config(chosen.config) if chosen.config else {}
        named = settings.pop("preset", "nanogpt-cpu")
        base = from_dict(PretrainConfig, settings, str(chosen.config), preset(chosen.preset or named))
    description = (
        "Train a model on text. Settings come from --preset NAME (nanogpt-cpu), then --config FILE (JSON or TOML), "
        "then the flags below. --resume RUN goes on with a run from its newest checkpoint, with the run's own settings."
    )
    config = _parse("pretrain", PretrainConfig, args, default=base, description=description)

    from pykern.train.pretrain import pretrain as train

    train(config, resume=chosen.resume is not None)


def grpo(args: list[str]) -> None:
    """Improve the model of a run by reinforcement learning (GRPO)."""
    from pykern.train.config import from_dict, read_config
    from pykern.train.grpo import grpo as train
    from pykern.train.grpo import started_config
    from pykern.train.grpo_config import GRPOConfig

    chosen, args = _sources(args, "config", "resume")
    if chosen.resume:
        base = dataclasses.replace(started_config(chosen.resume), out=chosen.resume)
    else:
        base = from_dict(GRPOConfig, read_config(chosen.config) if chosen.config else {}, str(chosen.config))
    description = (
        "Improve the model of the run --from by GRPO. Settings come from --config FILE (JSON or TOML), then the flags "
        "below. --resume RUN goes on with a GRPO run from its newest checkpoint, with the run's own settings."
    )
    config = _parse("grpo", GRPOConfig, args, default=base, description=description)
    train(config, resume=chosen.resume is not None)


def generate(args: list[str]) -> None:
    """Continue a prompt with the model of a run."""
    from pykern.train.sampling import GenerateConfig
    from pykern.train.sampling import generate as sample

    sample(_parse("generate", GenerateConfig, args))


def demo(args: list[str]) -> None:
    """Pretrain a small model on this machine, then teach it to add by GRPO."""
    from pykern.train import demo as module

    module.demo(_parse("demo", module.DemoConfig, args))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    command.__name__: command
    for command in (doctor, ops, check, ledger, traffic, bench, gpu, pretrain, grpo, generate, demo)
}


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 after `error: …`, 2 for wrong usage, 130 after Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] not in COMMANDS:
        return _fail(f"there is no command {args[0]!r}; there are {', '.join(COMMANDS)}", code=2)
    try:
        return COMMANDS[args[0]](args[1:]) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        return _fail(f"{error.name} is not installed: pip install 'pykern[train]'")
    except Exception as error:
        if type(error).__name__ != "UserError":  # its module is imported only by the commands that can raise it
            raise
        return _fail(str(error))


# What a disk or a file system does, as opposed to a mistake of ours.
_OF_THE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENODEV, errno.ESTALE,
}  # fmt: skip
_OPTIONAL = {"datasets", "matplotlib", "safetensors", "tensorboard", "tokenizers"}


def _usage() -> str:
    lines = [f"  {name:<10}{(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "usage: pykern COMMAND …\n\n" + "\n".join(lines) + "\n\n`pykern COMMAND --help` shows a command's options."


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _user_error(message: str) -> Exception:
    from pykern.train.errors import UserError

    return UserError(message)


def _sources(args: list[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Takes the flags that decide what all others' defaults are out of `args`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", type=str if name == "preset" else Path)
    chosen, rest = parser.parse_known_args(args)
    given = [name for name in names if getattr(chosen, name) is not None]
    if chosen.resume and len(given) > 1:
        raise _user_error(f"--resume takes the settings of its run: give single flags, not --{given[0]}")
    if chosen.resume and not (chosen.resume / "config.json").is_file():
        raise _user_error(f"{chosen.resume} is not a run: it has no config.json")
    return chosen, rest


def _parse(name: str, kind: Any, args: list[str], **options: Any) -> Any:
    """A value of the dataclass `kind` from flags; tyro exits with 2 for flags that do not fit, and shows which."""
    import tyro

    return tyro.cli(kind, args=args, prog=f"pykern {name}", **options)


def _with_options(name: str, function: Callable[..., int | None], args: list[str]) -> int | None:
    """Call `function` with its parameters from flags; without parameters there is nothing to parse."""
    import inspect

    if not inspect.signature(function).parameters and not args:
        return function()
    import tyro

    # What has no default is given without a flag: `pykern check layer_norm`.
    return tyro.cli(function, args=args, prog=f"pykern {name}", config=(tyro.conf.PositionalRequiredArgs,))


if __name__ == "__main__":
    sys.exit(main())
