from helpers import Process as Run  # noqa: F401
