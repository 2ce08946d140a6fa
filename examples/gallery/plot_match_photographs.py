"""
Matching two photographs
========================

Which patch of one picture is which patch of the other? The pictures are two parts of one photograph: the second one
is further to the right, darker, and noisy (scikit-learn's flower.jpg, by vultilion on Flickr, CC BY 2.0).
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

import sfr_ext

pixels = torch.from_numpy(np.array(load_sample_image("flower.jpg")))
photo = pixels.permute(2, 0, 1).float() / 255
first = photo[:, 40:360, 120:440]
second = 0.8 * photo[:, 80:400, 200:520] + 0.03 * torch.randn(3, 320, 320)

# %%
# A patch has 40 x 40 pixels. Its features are its colours, on 8 x 8 places, without their mean, scaled to length 1.


def features(image):
    small = F.interpolate(image[None], scale_factor=0.2, mode="area")
    patches = F.pixel_unshuffle(small, 8)
    return F.normalize(patches - patches.mean(1, keepdim=True), dim=1)


x, y = features(first), features(second)
print(x.shape)

# %%
# Not all patches of one picture are in the other. With a ``reach``, a patch that has no counterpart stays unmatched.

result = sfr_ext.solve_sample(x, y, solver="exact", reach=0.7)
picture = sfr_ext.plot.matches(first.clamp(0, 1), second.clamp(0, 1), result)

# %%
# Without it, every patch has to go somewhere. The lower row says what that costs.

balanced = sfr_ext.solve_sample(x, y, solver="exact")
overview = sfr_ext.plot.overview(first.clamp(0, 1), second.clamp(0, 1), balanced)
