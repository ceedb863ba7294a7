"""What a provider raises that cannot run a case."""


class Unavailable(RuntimeError):
    """A provider cannot run this case; the message says why."""
