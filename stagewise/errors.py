"""Every error class. Messages name the flag or the file and line, what was found, and what to do."""

from __future__ import annotations


class ArgumentError(ValueError):
    """A flag that cannot be honored; the message names the flag, what was found and what to do."""


class FileError(ArgumentError):
    """A file or path that cannot be used; the message names it, what was found and what to do."""


class RecordError(ValueError):
    """A record that can't be used: `where` is "file:line", `reason` the slug it is counted under."""

    def __init__(self, where: str, reason: str, message: str):
        super().__init__(f"{where}: {message}")
        self.where, self.reason, self.message = where, reason, message

    def __reduce__(self):  # exceptions with several arguments can't be pickled between processes without this
        return type(self), (self.where, self.reason, self.message)

    def saying(self, message: str) -> RecordError:
        """A copy of this error with another message."""
        self.message, self.args = message, (f"{self.where}: {message}",)
        return self


class TooLongError(RecordError):
    """A valid record that does not fit the length limits; its reason is one of TOO_LONG."""


class CutError(RecordError):
    """The file ends within a record: `lost` bytes of the uncompressed file belong to no complete record."""

    def __init__(self, where: str, message: str, lost: int):
        super().__init__(where, "truncated file", message)
        self.lost = lost

    def __reduce__(self):
        return type(self), (self.where, self.message, self.lost)


class RefusedJSON(ValueError):
    """JSON that is refused; `reason` is the slug that such records are counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class DirectoryError(ArgumentError):
    """A directory that cannot be written or replaced; the message says where everything is and what to do."""


class ModelError(ArgumentError):
    """A model or tokenizer that cannot be used; the message names the flag, what was found and what to do."""


class AdapterError(ArgumentError):
    """An adapter that cannot be attached, loaded or merged; the message names the flag and what to do."""


class MergeError(ArgumentError):
    """A merge that cannot be done or failed its check; the message says what to do."""


class InexactCut(ArgumentError):
    """A tokenizer's chat template that can't be cut exactly into text with and without labels."""


class EstimateError(ArgumentError):
    """An estimate that cannot be made; the message names the flag and what to do."""


class RopeError(ArgumentError):
    """Positions that cannot be scaled as requested; the message names the flag, what was found and what to do."""


class GenerationError(ValueError):
    """A model that does not support sampling here."""


class VocabularyError(ArgumentError):
    """A vocabulary that cannot be built or extended; the message names the flag, what was found and what to do."""


class ChatModelError(ArgumentError):
    """A model that cannot be used for chat as requested, or a question that cannot be asked; says what to do."""


class RowQuantizationError(ArgumentError):
    """A model without a row-wise quantized form, or a directory that holds none; the message says what to do."""


class RewardError(ArgumentError):
    """A reward model that cannot be loaded or does not fit; the message names the flag and what to do."""


class ChatError(ValueError):
    """An action that a chat does not allow; `key` names its message."""

    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


class NonFiniteError(RuntimeError):
    """Training cannot continue: several non-finite steps in a row, or non-finite weights."""
