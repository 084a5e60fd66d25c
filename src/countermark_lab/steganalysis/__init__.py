"""Steganalysis: can somebody who sees images tell which of them carry a mark? Without torch.

    images       the currency of all modules: images uint8 (n, C, H, W), and embedders
    spam         features of an image (numpy)
    detector     features, selection of the best, RBF-SVM; the images called stego
    ats          the unsupervised attack, from the suspect images and an embedder only
    supervised   the same detector, trained on known covers and stego images
    rates        how often a detector was right, with intervals
    embedders    functions that turn covers into stego images, by name

Training and the adaptive embedders need the extra `stego`; features, noise and LSB matching do not.
"""
