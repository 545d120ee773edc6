package edgeq.model

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.content.Context
import java.nio.FloatBuffer

/**
 * The model "@NAME@" in ONNX Runtime.
 *
 *     GraphModel(context).use { model ->
 *         val outputs = model.run(mapOf(name to values))
 *     }
 *
 * Arrays are given and returned in the order of axes of [INPUTS] and [OUTPUTS], as the model was
 * published. It is no class for several threads.
 */
class GraphModel(context: Context, threads: Int = 2) : AutoCloseable {
    /** An input or output. */
    class End(val shape: IntArray) {
        /** How many numbers it has. */
        val size: Int get() = shape.fold(1, Int::times)
    }

    private val environment: OrtEnvironment = OrtEnvironment.getEnvironment()
    private val session: OrtSession

    init {
        val options = OrtSession.SessionOptions()
        options.setIntraOpNumThreads(threads)
        val model = context.assets.open("@FILE@").use { it.readBytes() }
        session = environment.createSession(model, options)
    }

    /** Runs the model once: arrays by input name to arrays by output name. */
    fun run(inputs: Map<String, FloatArray>): Map<String, FloatArray> {
        require(inputs.keys == INPUTS.keys) { "the inputs are ${INPUTS.keys}, got ${inputs.keys}" }
        val given = INPUTS.mapValues { (name, end) ->
            val values = inputs.getValue(name)
            require(values.size == end.size) { "$name has ${values.size} numbers, not ${end.size}" }
            val shape = LongArray(end.shape.size) { end.shape[it].toLong() }
            OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), shape)
        }
        try {
            session.run(given).use { results ->
                return OUTPUTS.mapValues { (name, end) ->
                    val values = FloatArray(end.size)
                    (results.get(name).get() as OnnxTensor).floatBuffer.get(values)
                    values
                }
            }
        } finally {
            given.values.forEach { it.close() }
        }
    }

    override fun close() = session.close()

    companion object {
        /** Inputs by name. */
        val INPUTS: Map<String, End> = mapOf(
@INPUTS@
        )

        /** Outputs by name. */
        val OUTPUTS: Map<String, End> = mapOf(
@OUTPUTS@
        )
    }
}
