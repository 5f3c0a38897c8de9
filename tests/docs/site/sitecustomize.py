"""Python imports this at its start from PYTHONPATH: commands in the documents get the demo's weights, too."""

from tests.docs.demo_weights import use_at_import

use_at_import()
