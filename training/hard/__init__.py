"""A second, harder checkpoint: `python -m training.hard train --out FOLDER`.

Scenes of 24 x 24 visual tokens with small objects and words to read, and a model whose patches are taught only what
they show themselves. Three stages, each resumable from the work folder:

1. `tower`: vision and text tower, no language model. Linear heads read each patch's own contents: the colour that it
   shows, the letter in it, and the shape at the one patch that holds an object's centre. For a question, a softmax over
   patches is drawn to the patches asked for, and a sigmoid loss matches pooled images with names, as in `training`.
2. `language`: projector and Llama learn to answer from the same contents given as they are, without a tower. It needs
   nothing of the first stage, so both can run at the same time.
3. `join`: the projector is fitted to give the same embeds from the tower's features, and then projector and Llama go on
   learning to answer, from the features.
"""
