# SPDX-License-Identifier: Apache-2.0
"""How a training run lives: checkpoints, resume, several processes, what the command line asks for."""
