"""The errors that trl-cdr raises, each named after what it asks the user to do. Knows nothing of models or data.

    CDRError
    |- ConfigError      change an argument or an option
    |- ModelError       use another model or tokenizer, or load it differently
    |- InputError       mend the data of this call
    |- UnscorableError  a row could not be scored and `cdr_on_unscorable="raise"` asks to stop there

A row that can't be scored is no error by itself: `Score.error` holds the reason.
"""


class CDRError(Exception):
    """Base of everything that trl-cdr raises on purpose."""


class ConfigError(CDRError, ValueError):
    """An option is missing, unknown, of the wrong type or out of range. Change the argument that the message names."""


class ModelError(CDRError, RuntimeError):
    """A model or tokenizer can't serve as strong or weak. Use another one, or load it as the message says."""


class InputError(CDRError, ValueError):
    """A call's arguments don't fit together (lengths that differ, say). Mend the call; nothing was scored."""


class UnscorableError(CDRError, RuntimeError):
    """A row of the call can't be scored and `cdr_on_unscorable="raise"` was asked for. The message holds the reason."""
