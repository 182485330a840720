# SPDX-License-Identifier: Apache-2.0
"""What the models share: from calibration to the anomaly map (eq. 11, 16-18), pictures and export."""
