# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on the way, as data: which requests a fault meets, how often, and what it does to the answer."""
