# SPDX-License-Identifier: Apache-2.0
"""Patch SVDD (arXiv 2006.16067): patch features learned without labels, compared with those of normal images."""
