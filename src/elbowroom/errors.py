"""Every error that Elbowroom raises on purpose, in one tree.

    ElbowroomError
    ├── BudgetError            memory: does not fit
    │   ├── BudgetTooSmall     the budget cannot hold the model and one sequence; names the minimum
    │   └── OutOfBudget        an allocation was refused; lists the owners and what to lower
    ├── ModelError             a model directory cannot be used
    │   ├── UnknownArchitecture
    │   ├── ConfigError        config.json is missing, malformed or contradictory
    │   ├── CheckpointError    a weight file is missing, truncated, corrupt or of another shape
    │   └── TokenizerError     no tokenizer, or no chat template, where one is needed
    ├── PlanError              a KV plan string or a pair of its parts is refused
    ├── RequestError           a request is malformed; HTTP 400
    │   ├── ContextTooLong     prompt (and max_tokens) exceed the model's context
    │   ├── RequestTooLarge    the request can never fit into the KV budget; refused at once
    │   └── UnknownModel       HTTP 404
    ├── Overloaded             the queue is full; HTTP 429
    ├── Draining               the server is ending and takes nothing new; HTTP 503
    ├── TimedOut               the answer took longer than was allowed; HTTP 504
    ├── QueueTimeout           the request waited longer than is allowed; HTTP 503
    ├── Unread                 a client left too much of its answer unread
    ├── EngineClosed           the engine was shut down
    └── IntegrityError         an internal invariant does not hold, or a stored object fails its checksum

Each message says what was asked, what was found, and the setting that fixes it (``hint``).
"""

from __future__ import annotations


class ElbowroomError(Exception):
    """Base of all errors; ``str`` is the message, followed by the hint when there is one."""

    exit_code = 1
    http_status = 500
    code = "internal_error"
    retry_after_s = 1
    """What a client is told to wait, where waiting may help (429, 503)."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return message and hint."""
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class BudgetError(ElbowroomError):
    """Something does not fit the memory budget."""

    exit_code = 3
    http_status = 503
    code = "insufficient_memory"


class BudgetTooSmall(BudgetError):
    """The budget cannot hold the model and a single sequence."""

    def __init__(self, message: str, minimum_bytes: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.minimum_bytes = minimum_bytes


class OutOfBudget(BudgetError):
    """An allocation was refused by the ledger."""


class ModelError(ElbowroomError):
    """A model directory cannot be used."""

    exit_code = 4
    code = "model_error"


class UnknownArchitecture(ModelError):
    """config.json names an architecture that no family here implements."""


class ConfigError(ModelError):
    """config.json is missing, malformed or contradictory."""


class CheckpointError(ModelError):
    """A weight file is missing, truncated, corrupt or has another shape than the config says."""


class TokenizerError(ModelError):
    """A tokenizer or chat template is needed and absent or unreadable."""

    http_status = 400
    code = "tokenizer_error"


class PlanError(ElbowroomError):
    """A KV plan, or a pair of its parts, is refused."""

    exit_code = 2
    http_status = 400
    code = "invalid_plan"


class RequestError(ElbowroomError):
    """A request is malformed."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"


class ContextTooLong(RequestError):
    """The prompt, or prompt plus max_tokens, exceeds the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(RequestError):
    """The request can never fit into the KV budget."""

    code = "request_too_large"


class UnknownModel(RequestError):
    """No model of that name is served."""

    http_status = 404
    code = "model_not_found"


class Overloaded(ElbowroomError):
    """The queue is full."""

    http_status = 429
    code = "overloaded"


class Draining(ElbowroomError):
    """The server is ending and takes nothing new."""

    http_status = 503
    code = "draining"


class TimedOut(ElbowroomError):
    """The answer took longer than was allowed."""

    http_status = 504
    code = "request_timeout"


class QueueTimeout(ElbowroomError):
    """The request waited longer than is allowed."""

    http_status = 503
    code = "queue_timeout"


class Unread(ElbowroomError):
    """A client left too much of its answer unread."""

    http_status = 408
    code = "answer_not_read"


class EngineClosed(ElbowroomError):
    """The engine was shut down or has failed."""

    http_status = 503
    code = "engine_closed"


class IntegrityError(ElbowroomError):
    """An internal invariant does not hold, or a stored object fails its checksum."""
