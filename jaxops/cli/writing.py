"""`jaxops sample` and `jaxops chat`, for runs whose models write text."""

import argparse
import json
import sys
from typing import Any

from jaxops.core.failures import EXIT_OK, UserError
from jaxops.core.secret_text import printable

COMMANDS = ("sample", "chat")
HELP = "/reset forgets what was said, /exit or Ctrl-D ends"


def add_arguments(sample: Any, chat: Any) -> None:
    """Adds the arguments of both commands to their parsers."""
    source = sample.add_mutually_exclusive_group(required=True)
    kinds = "JSON lines, Parquet or CSV with a column `prompt` or `messages`, or a .txt file with a prompt a line"
    source.add_argument("--prompts", metavar="FILE", help=kinds)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    sample.add_argument("--out", help="a file that ends in .parquet, .csv, .tsv or .jsonl (default: print)")
    sample.add_argument("--json", action="store_true", help="print one JSON object a completion")
    for made in (sample, chat):
        made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text (may be repeated)")
        made.add_argument("--step", type=int, help="the checkpoint of this step")


def sample(args: argparse.Namespace) -> int:
    """Runs `jaxops sample RUN --prompts FILE | --prompt TEXT [--OPTION VALUE ...] [--out OUT]`."""
    from jaxops.cli.printing import console, say
    from jaxops.run.outputs import table_target, write_table

    if args.out is not None:
        table_target(args.out)
    model, options = _opened(args)
    told = lambda line: say(console(stderr=True), line)
    make = lambda: model.generate(args.prompts if args.prompt is None else [args.prompt], options, say=told)
    if args.out is not None:
        print(write_table(args.out, make, "completion"))
        return EXIT_OK
    rows = make().to_pylist()
    for at, row in enumerate(rows):
        if args.json:
            print(json.dumps(row, ensure_ascii=False, default=str))
        elif len(rows) == 1:
            print(printable(row["completion"]))
        else:
            print(f"{'' if at == 0 else chr(10)}--- {at + 1} of {len(rows)}\n{printable(row['completion'])}")
    return EXIT_OK


def chat(args: argparse.Namespace) -> int:
    """Runs `jaxops chat RUN [--OPTION VALUE ...]`: lines from standard input are answered as they come."""
    model, options = _opened(args)
    conversation = model.chat(options)
    asks = sys.stdin.isatty()
    if asks:
        print(f"{args.run}, step {model.saved.step}: {HELP}", file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        said = line.rstrip("\r\n")
        if not line or said.strip() == "/exit":
            return EXIT_OK
        if said.strip() == "/reset":
            conversation.reset()
        elif said.strip().startswith("/") and said.strip()[1:].isalpha():
            print(f"jaxops: no command {said.strip()}; {HELP}", file=sys.stderr)
        elif said.strip():
            _answer(conversation, said)


def _answer(conversation: Any, said: str) -> None:
    """Prints an answer as it is written; what cannot be answered is told, and the conversation goes on."""
    try:
        conversation.answer(said, lambda text: print(printable(text), end="", flush=True))
    except UserError as error:
        print(f"jaxops: {printable(str(error))}", file=sys.stderr)
        return
    print(flush=True)


def _opened(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model of a run that writes text, and the options of its family.

    Raises:
      UserError: no run, a family that writes no text, or an option that it does not have.
    """
    from jaxops.cli.options import overrides_of, read_options
    from jaxops.run.load import open_saved_run, saved_family, serve

    command = f"jaxops {args.command}"
    list(overrides_of(args.options, command))
    schema = saved_family(args.run, args.trust).generate
    if schema is None:
        raise UserError(f"{command}: the model of {args.run} writes no text")
    options = read_options(schema, args.options, f"{command} {args.run}", {"stop": args.stop} if args.stop else {})
    return serve(open_saved_run(args.run, args.step, trust=args.trust, accept_code=args.accept_code)), options
