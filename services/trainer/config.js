// The parameters of a training. The service edits a copy of this file between rounds; names, comments and layout stay.
export default {
  // What is learnt.
  imageSize: 32,        // pixels; a power of two from 16 to 128; larger arrays are scaled down to it
  latentDim: 64,        // length of the noise vector z
  width: 16,            // channels at the full resolution; they double at each halving, up to 4 times this

  // How it is learnt.
  steps: 250,           // updates of each network per round
  batchSize: 16,        // real images per update
  learningRate: 1e-3,   // of both networks
  beta2: 0.99,          // second moment of Adam; the first is 0
  gamma: 3.0,           // weight of the gradient penalties R1 and R2
  emaImages: 2000,      // half-life of the averaged generator, in images

  seed: 0,              // of the weights, the order of the images and the noise
};
