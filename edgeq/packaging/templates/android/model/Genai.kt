package edgeq.model

import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Model
import ai.onnxruntime.genai.Tokenizer
import android.content.Context
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.withContext

/**
 * The language model "@NAME@" in onnxruntime-genai.
 *
 *     val model = LanguageModel.open(context)
 *     model.answer("Hello").collect { piece -> textView.append(piece) }
 *     model.close()
 *
 * [answer] begins anew each time. Call it from one coroutine at a time.
 */
class LanguageModel private constructor(
    /** The tier that was chosen. */
    val tier: Tier,
    private val model: Model,
    private val tokenizer: Tokenizer,
    private val greedy: Boolean,
) : AutoCloseable {
    /** What the model answers to one message, piece by piece as it is written. */
    fun answer(message: String): Flow<String> =
        if (BEFORE.isEmpty() && AFTER.isEmpty()) {
            continueText(message)
        } else {
            write(tokenizer.encode(BEFORE + message + AFTER).getSequence(0))
        }

    /** What the model writes after a text that is given as it is. */
    fun continueText(text: String): Flow<String> =
        write(START + tokenizer.encode(text).getSequence(0))

    private fun write(ids: IntArray): Flow<String> =
        flow {
            tokenizer.createStream().use { stream ->
                for (token in tokens(ids, tier.context)) emit(stream.decode(token))
            }
        }.flowOn(Dispatchers.Default)

    /** Token ids after those of a prompt, at most until [total] tokens are there. */
    internal fun tokens(prompt: IntArray, total: Int): Sequence<Int> =
        sequence {
            GeneratorParams(model).use { parameters ->
                parameters.setSearchOption("max_length", total.toDouble())
                parameters.setSearchOption("do_sample", !greedy)
                if (!greedy) {
                    parameters.setSearchOption("top_k", 40.0)
                    parameters.setSearchOption("top_p", 0.95)
                    parameters.setSearchOption("temperature", 0.8)
                }
                Generator(model, parameters).use { generator ->
                    generator.appendTokens(prompt)
                    while (!generator.isDone) {
                        generator.generateNextToken()
                        yield(generator.getLastTokenInSequence(0))
                    }
                }
            }
        }

    override fun close() {
        tokenizer.close()
        model.close()
    }

    companion object {
        // what the model's chat template writes before and after a user's message
        private const val BEFORE = @BEFORE@
        private const val AFTER = @AFTER@

        // what the model wants before any other text; onnxruntime-genai does not add it
        private val START = intArrayOf(@START@)

        /** The ways to run the model, from the most memory to the least. */
        val TIERS: List<Tier> = listOf(
@TIERS@
        )

        /**
         * Loads the model, which takes seconds; the first time it is also copied out of the app.
         *
         * @param tiers the tiers to choose from; the first for which there is memory is taken
         * @param greedy always write the most likely token, for tests
         * @throws ModelUnavailableException if the device has not enough memory now
         */
        suspend fun open(
            context: Context,
            tiers: List<Tier> = TIERS,
            greedy: Boolean = false,
        ): LanguageModel =
            withContext(Dispatchers.IO) {
                val tier = ModelFiles.choose(context, tiers)
                val folder = ModelFiles.install(context, tier.files)
                val model = Model(folder.resolve(tier.entry).path)
                LanguageModel(tier, model, Tokenizer(model), greedy)
            }
    }
}
