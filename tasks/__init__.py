"""The stages of the fine-tuning pipeline, one a file; below them the rooms that they share.

What takes seconds to import (torch, Transformers, PEFT, lm-eval …) is imported in the functions that use it: a run that
finds all cached, `--plan` and `--help` do without.
"""

import logging

# It recommends a package for quicker 4-bit products on the CPU at each start, whether they are used or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
