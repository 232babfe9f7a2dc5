"""`python -m cuda_cnn …` is `cuda-cnn …`."""

import sys

from .cli import main

sys.exit(main())
