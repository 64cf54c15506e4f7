# SPDX-License-Identifier: Apache-2.0
"""Makes the family known to pytest; an entry point does so for the `parity` command too."""

from bag_family import FAMILY

from harness import register_family

register_family(FAMILY)
