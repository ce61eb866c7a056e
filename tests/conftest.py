import os

import hypothesis

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network

hypothesis.settings.register_profile("dashq", deadline=None, derandomize=True)  # first torch calls are slow
hypothesis.settings.load_profile("dashq")
