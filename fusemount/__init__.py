"""Guest files through FUSE, without root. This package stands on nbdserve's image layer and is not imported by it."""
