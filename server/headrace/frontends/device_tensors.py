"""Tensors in the memory of GPUs: inputs are fetched before their request runs, outputs are delivered after it has.

Everything else of a request is done in one step, which copies from and to a GPU are too slow for.
"""

import asyncio

import msgspec

from headrace.client_memory import ClientMemory
from headrace.core.errors import HeadraceError, at
from headrace.core.regions import input_of, output_of, output_places
from headrace.core.request import InferRequest, InferResponse, Place
from headrace.core.tensor import Buffer, Tensor
from headrace.cuda_memory.regions import CudaRegions
from headrace.engine import Answer, Engine


class DeviceTensors:
    """Has requests run whose tensors may be on GPUs. One for a server, used on the event loop only."""

    def __init__(self, engine: Engine, memory: ClientMemory, cuda: CudaRegions) -> None:
        self._engine = engine
        self._memory = memory
        self._cuda = cuda

    def infer(self, request: InferRequest) -> Answer:
        """As ``engine.infer``; the answer's outputs are where the client wants them."""
        if not request.to_fetch and not (request.outputs and self._wanted(request)):
            return self._engine.infer(request)
        return asyncio.get_running_loop().create_task(self._run(request))

    async def fetched(self, request: InferRequest) -> InferRequest:
        """The request with all its inputs.

        Raises:
            HeadraceError: one cannot be fetched; naming model, input and region.
        """
        if not request.to_fetch:
            return request
        inputs = list(request.inputs)
        try:
            found = await asyncio.gather(
                *(self._fetch(request.model, inputs[index], place) for index, place in request.to_fetch)
            )
        except HeadraceError:
            self._engine.count_unreadable(request.model, request.version)
            raise
        for (index, _), data in zip(request.to_fetch, found, strict=True):
            inputs[index] = msgspec.structs.replace(inputs[index], data=data)
        return msgspec.structs.replace(request, inputs=tuple(inputs), to_fetch=())

    async def delivered(self, response: InferResponse, request: InferRequest) -> InferResponse:
        """The response once the outputs are there that are wanted on a GPU.

        Raises:
            HeadraceError: one cannot be written; naming model, output and region.
        """
        wanted = self._wanted(request) if request.outputs else {}
        outputs = [tensor for tensor in response.outputs if tensor.name in wanted]
        if not outputs:
            return response
        await asyncio.gather(*(self._deliver(response.model, tensor, wanted[tensor.name]) for tensor in outputs))
        return msgspec.structs.replace(response, delivered=frozenset(tensor.name for tensor in outputs))

    async def _run(self, request: InferRequest) -> InferResponse:
        request = await self.fetched(request)
        return await self.delivered(await self._engine.infer(request), request)

    def _wanted(self, request: InferRequest) -> dict[str, Place]:
        """The outputs that are wanted on GPUs, and where."""
        places = output_places(request.outputs, request.model)
        return {name: place for name, place in places.items() if self._memory.is_on_gpu(place.region)}

    async def _fetch(self, model: str, tensor: Tensor, place: Place) -> Buffer:
        try:
            return await self._cuda.read(place)
        except HeadraceError as error:
            raise at(input_of(model, tensor.name), error) from None

    async def _deliver(self, model: str, tensor: Tensor, place: Place) -> None:
        try:
            await self._cuda.write(place, tensor.data)
        except HeadraceError as error:
            raise at(output_of(model, tensor.name), error) from None
