"""No test needs the network: said before transformers is imported, so that it does not try."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
