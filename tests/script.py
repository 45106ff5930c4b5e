from helpers import BASE, STILL, Run, run_script  # noqa: F401
