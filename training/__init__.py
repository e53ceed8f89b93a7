"""Trains the embedded model from random weights: `python -m training --out FOLDER`.

Not part of the installed package: run it from a checkout. Two stages, as for LLaVA, and a third for compression, each
resumable from the work folder, and a fourth for a method of pruning:

1. `tower`: vision and text tower, no language model. Three losses: linear heads that read each object's properties
   from every patch of it (they are dropped afterwards); for a question, a softmax over patches of
   cos(patch, question) against the patches asked for; and a sigmoid image-text loss (SigLIP, arXiv 2303.15343) on the
   pooled image. To see more scenes in the same time, most steps run on half of the patches, chosen at random with
   objects preferred; the last steps see all of them. A second, shorter pass (`tower-again`) starts from a lower rate.
2. `language`: the tower is frozen, and projector and Llama learn to answer eight questions packed behind one image,
   each blind to the others. Training starts with few visual tokens, so that the question's words are not drowned
   before attention has learned where to look, and ends with all of them. The later passes (`language-again`,
   `language-last`, `language-counts`) ask more often what comes late. No token is ever dropped by a pruning method.
3. `compressor`: all of that is frozen, and the compressor of `--plc trained` learns to make visual tokens from which
   the language model answers right. Tokens are chosen as for any answer: relevance, contextual region, gridprune. The
   scenes are new to tower and language model, which know those that they learned from too well.
4. `pruner`: likewise the module of `--method covipal`, which learns to score visual tokens before the language model:
   from the attention of a deeper layer, and then (`pruner-again`) from the loss of answers for which tokens are softly
   dropped by these scores. `--checkpoint pruner` runs this stage alone, on a checkpoint that is there.

With `--checkpoint localizer` the third stage is another one, for the small model that answers questions with boxes on
CROP's 8 x 8 grid. `localizer` starts from the tower's first layers and trains them with a language model behind them.
Linear heads read each object's properties, its box and those of its like and its neighbours from every patch of it;
they too are dropped afterwards. `localizer-tower` goes on with the tower alone. `localizer-again` freezes it, and puts
the first layers of the main model's language model, which attend to what a question asks for, behind it.
"""
