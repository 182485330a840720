# SPDX-License-Identifier: Apache-2.0
"""The commands that train, test and tabulate: the paper's figures, its ablations, the image size, speed."""
