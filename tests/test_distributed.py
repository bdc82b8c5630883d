"Two processes give the loss and the gradient of one process on the whole batch"
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from medvlp.losses.contrastive import gather, info_nce


def heads():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(5, 4), nn.Linear(6, 4)]).double()

def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=g, dtype=torch.float64), torch.randn(8, 6, generator=g, dtype=torch.float64)

class Loss(nn.Module):
    def __init__(self): super().__init__(); self.heads = heads()
    def forward(self, images, texts): return info_nce(gather(self.heads[0](images)), gather(self.heads[1](texts)), temperature=.2)

def worker(rank, world, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(Loss())
    loss = model(*(x.chunk(world)[rank] for x in batch()))
    loss.backward()
    results[rank] = loss.item(), [p.grad.tolist() for p in model.parameters()]
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    alone = Loss()
    loss = alone(*batch())
    loss.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (2, tmp_path/"rendezvous", results), nprocs=2)
        assert set(results.keys()) == {0, 1}
        for value, grads in results.values():
            assert abs(value - loss.item()) < 1e-12
            for g, p in zip(grads, alone.parameters(), strict=True): torch.testing.assert_close(torch.tensor(g, dtype=torch.float64), p.grad, atol=1e-12, rtol=0)
