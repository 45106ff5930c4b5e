"""The demo: a teacher and its students on real handwritten digits, by the very training script.

`make demo`, or `python -m timm_kd.demo` in a clone with the `demo` extra installed. What it prints behind a `$` can be
repeated by hand; what it makes is below `demo_output/`, and made anew by the next demo.
"""
