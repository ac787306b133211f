// The parameters of a training. The service edits a copy of this file between rounds; names, comments and layout stay.
export default {
  // What is learnt.
  imageSize: 32,        // pixels; a power of two from 16 to 256; larger arrays are scaled down to it
  latentDim: 64,        // length of the noise vector z
  width: 16,            // channels at the full resolution; they double at each halving, up to 4 times this
  symmetric: false,     // whether a mirrored image is as good as the image itself; then both are learnt

  // How it is learnt.
  steps: 250,           // updates of each network per round
  batchSize: 16,        // real images per update
  learningRate: 1e-3,   // of both networks, at the start; it ends at a fifth of this
  beta2: 0.99,          // second moment of Adam; the first is 0
  gamma: 3.0,           // weight of the gradient penalties R1 and R2 at the start; it ends at a tenth. 4 times as much at twice the size
  annealImages: 50000,  // images, over all rounds, after which rate and weight are at their ends
  augmentation: 0.1,    // least probability of random changes before the discriminator; it rises, up to 0.8, where that overfits
  emaImages: 2000,      // half-life of the averaged generator, in images

  seed: 0,              // of the weights, the order of the images and the noise
};
