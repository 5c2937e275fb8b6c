"""What goes wrong in the demo, told in one line."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; its message says what the user can do.

    It happens when a package, a model or an adapter folder is missing or is not the expected one:

        except DemoError as error:
            print(error, file=sys.stderr)
    """
