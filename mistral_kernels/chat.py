"""What `mistral-kernels chat` does: a conversation at a terminal, or with the lines of a pipe.

stdout gets the answers, stderr all else. What cannot be done is told in one line, and the chat goes
on.
"""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.console import Console

from mistral_kernels.model.conversation import Conversation
from mistral_kernels.model.families import is_chat_name
from mistral_kernels.model.hub import model_name
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.options import Sampling
from mistral_kernels.rates import rates_line, timings
from mistral_kernels.text_input import MessageReader
from mistral_kernels.whole_file import write_json

HELP = '''\
/reset      forget what was said, but not the system prompt
/save FILE  write the conversation to FILE, as JSON
/help       tell this
/exit       end the chat, as Ctrl-D does
Ctrl-C stops an answer; what was said of it stays in the conversation.
A line that ends in a backslash goes on in the next; """ begins and ends a message of many lines.'''


def run_chat(
    model: Transformer,
    tokenizer: Tokenizer,
    reader: MessageReader,
    sampling: Sampling,
    *,
    system: str | None = None,
    context: int | None = None,
) -> None:
    """Answer what `reader` reads until its end or /exit.

    Args:
        model, tokenizer: who answers.
        reader: where messages and commands come from.
        sampling: how answers are drawn; turn i draws from its seed + i.
        system, context: see Conversation.

    Raises:
        TypeError, ValueError: context is out of range, or there is no chat with this tokenizer.
    """
    # An answer may be encoded as other tokens than were drawn: all of it can be taken back.
    conversation = Conversation(
        model, tokenizer, system=system, context=context, lookahead=sampling.max_tokens
    )
    name = model_name(model.folder)
    for_chat = tokenizer.has_chat_template or is_chat_name(name)
    kind = "" if for_chat else "; by its name and files not a chat model: answers may make no sense"
    dtype = str(model.dtype).removeprefix("torch.")
    version = tokenizer.version or tokenizer.path.name
    _tell(f"{name}, tokenizer {version}, {dtype} on {model.device}{kind}")
    if reader.interactive:
        _tell("/help tells what can be typed.")
    _Chat(conversation, reader, sampling).run()


class _Chat:
    def __init__(self, conversation: Conversation, reader: MessageReader, sampling: Sampling):
        self.conversation, self.reader, self.sampling = conversation, reader, sampling
        self._saved: set[Path] = set()  # files written here, which /save may overwrite

    def run(self) -> None:
        going_on, interrupted = True, False
        while going_on:
            # All that takes time is done in here, where one more Ctrl-C cannot end the chat.
            try:
                if interrupted:
                    interrupted = False
                    _tell("\nCtrl-C stops an answer; Ctrl-D or /exit ends the chat.")
                going_on = self._turn()
            except KeyboardInterrupt:
                if not self.reader.interactive:
                    raise
                interrupted = True

    def _turn(self) -> bool:
        """Do what is typed next; False if it ends the chat."""
        try:
            typed = self.reader.read()
            if typed is None:
                if self.reader.interactive:
                    _tell("")  # Ctrl-D leaves the cursor behind the prompt
                return False
            if typed.is_command:
                return self._command(typed.text)
            if typed.text.strip():
                self._answer(typed.text)
        except (ValueError, RuntimeError) as error:
            _tell_error(str(error))
        return True

    def _command(self, line: str) -> bool:
        """Do what a command says; False for /exit."""
        name, _, argument = line.partition(" ")
        if argument and name in ("/reset", "/help", "/exit"):
            _tell_error(f"{name} takes no argument, got {argument!r}")
        elif name == "/reset":
            self.conversation.reset()
            _tell("The conversation is empty.")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/help":
            _tell(HELP)
        elif name != "/exit":
            _tell_error(f'there is no command {name} (see /help); a message in """ may begin so')
        return name != "/exit" or bool(argument)

    def _save(self, name: str) -> None:
        if not name:
            _tell_error("/save wants the name of a file")
            return
        path = Path(name).expanduser().absolute()
        try:
            if path.exists() and path not in self._saved:
                _tell_error(f"/save: {path} exists already")
                return
            content = {"system": self.conversation.system}
            write_json(path, content | {"messages": self.conversation.messages})
        except OSError as error:
            _tell_error(f"/save: {path}: {error.strerror}")
            return
        self._saved.add(path)
        _tell(f"{len(self.conversation.messages)} messages are in {path}")

    def _answer(self, text: str) -> None:
        """Show the answer to a message as it comes, then its rates."""
        options = self.sampling._asdict()
        if self.sampling.seed is not None:
            options["seed"] += len(self.conversation.messages) // 2
        try:
            pieces = self.conversation.reply(text, **options)
        except ValueError as error:
            _tell_error(f"{error}; the conversation is as before, /reset begins a new one")
            return
        times, said, stopped = [time.perf_counter()], False, False
        try:
            for piece in pieces:
                times.append(time.perf_counter())
                said = said or bool(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self.reader.interactive:
                raise
            stopped = True
        finally:
            print(flush=True)
        times.append(time.perf_counter())
        self._tell_turn(times, said, stopped)

    def _tell_turn(self, times: list[float], said: bool, stopped: bool) -> None:
        """Tell how the turn went: rates, tokens reused, and whether the answer is whole."""
        turn, parts = self.conversation, []
        if turn.tokens_drawn or not stopped:
            parts.append(rates_line(timings(turn.tokens_fed, turn.tokens_drawn, times)))
            parts.append(f"{turn.tokens_reused} tokens reused")
        if stopped:
            parts.append("stopped")
        elif turn.finish_reason == "length" and turn.tokens_drawn < self.sampling.max_tokens:
            parts.append(f"cut: the context of {turn.context} tokens is full, /reset empties it")
        elif turn.finish_reason == "length":
            parts.append("cut: --max-tokens")
        if not said:
            parts.append("no answer, so the message is not kept")
        # Dim where the terminal can be: not a dumb one, and not with NO_COLOR.
        console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        console.print("; ".join(parts), style="dim")


def _tell(text: str) -> None:
    typer.echo(text, err=True)


def _tell_error(text: str) -> None:
    _tell(f"mistral-kernels: {' '.join(text.split())}")
