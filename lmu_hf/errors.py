"""Errors whose message alone tells a person what to do."""


class InputError(ValueError):
    """Wrong input from outside: a file, a column, a value, a folder. The command line prints it as one line."""


class HubError(RuntimeError):
    """The Hub could not be reached or failed, through no fault of the input; trying again later may help."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says that says anything, else its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
