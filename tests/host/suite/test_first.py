from .conftest import pack, run


def test_path(loaded):
    import torch
    sd = loaded("sd15")
    adapters = pack("conceptsplit_core.adapters")
    m = pack("conceptsplit_core.hosts.comfy.model")
    shapes = m.layer_shapes(sd.model.model)
    print(shapes)
    info = adapters.AdapterInfo("rex", "dog", "sd15", 768, 4, 4.0)
    ad = adapters.ValueAdapter.create(shapes, info, 0)
    for k in ad.up: ad.up[k] = torch.randn_like(ad.up[k])*0.1
    model, clip = run("ConceptSplitApply", model=sd.model, clip=sd.clip, value_adapter=ad, concept_name="", strength=1.0)
    (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
    (pos,) = run("CLIPTextEncode", clip=clip, text="a photo of <rex> and a cat")
    (neg,) = run("CLIPTextEncode", clip=clip, text="blurry")
    print(pos[0][1]["conceptsplit"])
    (lat,) = run("EmptyLatentImage", width=64, height=64, batch_size=1)
    out, maps = run("ConceptSplitKSampler", model=model, seed=1, steps=4, cfg=5.0, sampler_name="euler", scheduler="normal", positive=pos, negative=neg, latent_image=lat, denoise=1.0, loda_steps=2, loda_strength=0.05, afg=True)
    print(maps.trace.to_dict())
    (img,) = run("VAEDecode", vae=sd.vae, samples=out)
    s, c = run("ConceptSplitPreview", attention_maps=maps, images=img)
    print(s.shape, c.shape)
