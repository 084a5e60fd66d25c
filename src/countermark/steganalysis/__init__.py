"""Can somebody who sees images tell which of them carry a mark? Steganalysis, without torch.

    images       what all modules take: uint8 (n, C, H, W), and embedders
    spam         features of an image (numpy)
    detector     features, selection of the best, RBF-SVM; what was called stego
    ats          the unsupervised attack: nothing but the suspect images and an embedder
    supervised   the same detector, trained on covers and stego images that are known as such
    rates        how often it was right, with intervals
    embedders    what covers are turned into stego images with, by name

Training and the adaptive embedders need the extra `stego`; features, noise and LSB matching do not.
"""
