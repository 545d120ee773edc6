package edgeq.model

import android.content.Context
import com.google.ai.edge.litertlm.Conversation
import com.google.ai.edge.litertlm.ConversationConfig
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import com.google.ai.edge.litertlm.SamplerConfig
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.withContext

/**
 * The language model "@NAME@" in LiteRT-LM.
 *
 *     val model = LanguageModel.open(context)
 *     model.answer("Hello").collect { piece -> textView.append(piece) }
 *     model.close()
 *
 * One model is one conversation: [answer] remembers what was said before, and [forget] ends that.
 * Call it from one coroutine at a time.
 */
class LanguageModel private constructor(
    /** The tier that was chosen. */
    val tier: Tier,
    private val engine: Engine,
    private val greedy: Boolean,
) : AutoCloseable {
    private var conversation: Conversation = begin()

    private fun begin(): Conversation {
        val sampler =
            if (greedy) {
                SamplerConfig(topK = 1, topP = 1.0, temperature = 1.0)
            } else {
                SamplerConfig(topK = 40, topP = 0.95, temperature = 0.8)
            }
        return engine.createConversation(ConversationConfig(samplerConfig = sampler))
    }

    /** What the model answers, piece by piece as it is written. */
    fun answer(message: String): Flow<String> =
        conversation.sendMessageAsync(message).map { it.toString() }.flowOn(Dispatchers.IO)

    /** Begins a new conversation. */
    fun forget() {
        conversation.close()
        conversation = begin()
    }

    override fun close() {
        conversation.close()
        engine.close()
    }

    companion object {
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
                val engine = Engine(
                    EngineConfig(
                        modelPath = folder.resolve(tier.entry).path,
                        cacheDir = context.cacheDir.path,
                    ),
                )
                engine.initialize()
                LanguageModel(tier, engine, greedy)
            }
    }
}
