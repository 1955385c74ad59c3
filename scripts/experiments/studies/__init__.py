"""Studies: are both frameworks equally accurate, what does convolution gain, and which pictures are recognised?"""
